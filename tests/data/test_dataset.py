from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import EOD, roles_of, some_sizes, splits, tokens_of, train, write

from megatsp.data.corpus import Corpus
from megatsp.data.dataset import SampledCorpus
from megatsp.data.indexed import IndexedWriter
from megatsp.data.permutation import Permutation
from megatsp.data.splits import split_documents
from megatsp.data.tokenizer import ByteTokenizer

SIZES = some_sizes(40)
PACKINGS = ["concat", "greedy", "best_fit", "pad"]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "corpus", SIZES)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "spoken", SIZES, roles=True)


def samples(prefix: Path, split: str = "train", **more) -> SampledCorpus:
    blend = getattr(splits(str(prefix), **more), split)
    return blend.sources[0].samples


def documents_in_order(data: SampledCorpus) -> list[int]:
    """By their second token, which says which they are."""
    return [(int(tokens[0]) - 1) % 251 for tokens in data.documents()]


@pytest.mark.parametrize("seq_length", [1, 2, 7, 50])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_concatenated_samples_cover_the_stream(prefix, split, seq_length):
    data = samples(prefix, split, seq_length=seq_length)
    stream = np.concatenate(list(data.documents())).astype(np.int64)
    assert len(data) == (len(stream) - 1) // seq_length
    for i in range(len(data)):
        sample = data.sample(i)
        window = stream[i * seq_length : i * seq_length + seq_length + 1]
        assert sample.tokens.tolist() == window[:-1].tolist()
        assert sample.labels.tolist() == window[1:].tolist()
        assert sample.mask.tolist() == [1.0] * seq_length and sample.first is None
        assert (sample.tokens.dtype, sample.labels.dtype, sample.mask.dtype) == (
            np.int64,
            np.int64,
            np.float32,
        )


def test_splits_are_disjoint_complete_shuffled_and_seeded(prefix):
    orders = {
        (split, seed): documents_in_order(samples(prefix, split, seed=seed, test_fraction=0.1))
        for split in ("train", "valid", "test")
        for seed in (5, 6)
    }
    for seed in (5, 6):
        together = [d for split in ("train", "valid", "test") for d in orders[split, seed]]
        assert sorted(together) == list(range(40))
        assert [len(orders[s, seed]) for s in ("train", "valid", "test")] == [28, 8, 4]
        assert orders["train", seed] != sorted(orders["train", seed])
    assert set(orders["valid", 5]) != set(orders["valid", 6])


def test_ranges_of_splits():
    assert split_documents(100, 0.07, 0.02) == {"valid": (0, 7), "test": (7, 9), "train": (9, 100)}


@pytest.mark.parametrize("packing", PACKINGS[1:])
@pytest.mark.parametrize("seq_length", [3, 16, 250])
def test_packed_samples_train_every_transition_of_every_document_once(prefix, packing, seq_length):
    data = samples(prefix, packing=packing, seq_length=seq_length)
    found = []
    for i in range(len(data)):
        tokens, labels, mask, first = data.sample(i)
        pieces = data.pieces(i)
        assert first is not None and len(tokens) == len(first) == seq_length
        at = 0
        for document, offset, length in pieces:
            expected = tokens_of(document, SIZES[document])
            inside = slice(at, at + length)
            assert tokens[inside].tolist() == expected[offset : offset + length]
            assert labels[inside].tolist() == expected[offset + 1 : offset + length + 1]
            assert mask[inside].tolist() == [1.0] * length and first[inside].tolist() == [at] * length
            found += [(document, offset + j) for j in range(length)]
            at += length
        assert tokens[at:].tolist() == labels[at:].tolist() == [EOD] * (seq_length - at)
        assert not mask[at:].any() and first[at:].tolist() == [at] * (seq_length - at)
        assert packing != "pad" or len(pieces) == 1
    everything = [(d, i) for d in sorted(documents_in_order(data)) for i in range(SIZES[d] - 1)]
    assert sorted(found) == everything


@pytest.mark.parametrize("how, lost", [("truncate", "truncated"), ("drop", "dropped")])
def test_long_documents_are_counted(prefix, how, lost):
    data = samples(prefix, packing="best_fit", long_documents=how)
    chosen = documents_in_order(data)
    long = [d for d in chosen if SIZES[d] - 1 > 16]
    assert data.facts[lost] == len(long) > 3
    found = sorted(piece.document for i in range(len(data)) for piece in data.pieces(i))
    assert found == sorted(chosen if how == "truncate" else set(chosen) - set(long))
    assert all(piece.offset == 0 for i in range(len(data)) for piece in data.pieces(i))


def test_concatenation_with_borders_masks_the_labels_that_cross_them(prefix):
    data = samples(prefix, reset_attention_mask=True)
    plain = samples(prefix)
    for i in range(len(data)):
        tokens, labels, mask, first = data.sample(i)
        assert tokens.tolist() == plain.sample(i).tokens.tolist()
        assert labels.tolist() == plain.sample(i).labels.tolist()
        assert (
            mask.tolist() == (tokens != EOD).astype(float).tolist()
        )  # what follows an eod is another document's
        starts = [0, *(np.flatnonzero(tokens[:-1] == EOD) + 1)]
        assert first is not None and first.tolist() == [max(s for s in starts if s <= j) for j in range(16)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    "loss_on, roles", [("assistant", (1, 2)), ("last", (2,)), ("all", (0, 1, 2)), ("auto", (1, 2))]
)
def test_labels_are_trained_by_role(spoken, packing, loss_on, roles):
    data = samples(spoken, packing=packing, loss_on=loss_on, reset_attention_mask=True)
    trained = 0
    for i in range(len(data)):
        mask, at = data.sample(i).mask, 0
        for document, offset, length in data.pieces(i):
            expected = [
                float(role in roles) for role in roles_of(document, SIZES[document])[offset + 1 :][:length]
            ]
            assert mask[at : at + len(expected)].tolist() == expected
            trained += sum(expected)
            at += length
    assert trained > 0


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("reset", [False, True])
def test_any_positions_can_be_read_alone(spoken, packing, reset):
    data = samples(spoken, packing=packing, seq_length=30, reset_attention_mask=reset, loss_on="assistant")
    random = np.random.RandomState(0)
    for i in range(len(data)):
        cuts = sorted(random.choice(31, 4, replace=False).tolist())
        spans = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
        chosen = np.r_[tuple(slice(*span) for span in spans)]
        whole, part = data.sample(i), data.sample(i, spans)
        for of_whole, of_part in zip(whole[:3], part[:3], strict=True):
            assert of_part.tolist() == of_whole[chosen].tolist()
        assert (part.first is None) == (whole.first is None)
        assert part.first is None or part.first.tolist() == whole.first.tolist()


@pytest.mark.parametrize("packing", PACKINGS)
def test_no_token_of_another_position_is_read_but_labels(prefix, packing, monkeypatch):
    data = samples(prefix, packing=packing, seq_length=40)
    read: list[int] = []
    original = Corpus.tokens
    monkeypatch.setattr(
        Corpus,
        "tokens",
        lambda self, d, start, stop: (read.append(stop - start), original(self, d, start, stop))[1],
    )
    for i in range(len(data)):
        read.clear()
        data.sample(i, [(0, 5), (35, 40)])
        runs = 2 if packing == "concat" else len(read)  # each run of inputs needs one token more
        assert sum(read) <= 10 + runs


@pytest.mark.parametrize("index", [-1, 10**6])
def test_sample_out_of_range(prefix, index):
    with pytest.raises(IndexError, match=f"sample {index} of "):
        samples(prefix).sample(index)
    with pytest.raises(IndexError, match=f"sample {index} of "):
        samples(prefix).pieces(index)


def test_names_of_a_samples_documents(prefix):
    blend = train(prefix, packing="greedy")
    for draw in blend.draw(0, 10):
        pieces = blend.sources[0].samples.pieces(draw.sample)
        assert blend.names(draw) == list(dict.fromkeys(f"file{p.document} document 0" for p in pieces))


def test_ids_outside_the_vocabulary_are_found_in_foreign_data(tmp_path):
    """Megatron's files do not say what their largest id is."""
    prefix = write(tmp_path / "data", [30, 20, 10])
    for suffix in (".json", ".inputs"):
        prefix.with_suffix(suffix).unlink()
    data = samples(prefix, vocab_size=200, valid_fraction=0.0)
    with pytest.raises(
        ValueError, match=r"holds the id 256, and model.vocab_size is 200; it is in one of: .* document"
    ):
        for i in range(len(data)):
            data.sample(i)
    with pytest.raises(ValueError, match="^data.loss_on=last: .*does not say who speaks"):
        samples(prefix, loss_on="last")


def test_documents_without_tokens_in_foreign_data(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "foreign.bin"), dtype=np.uint16)
    contents = [[1, 2, 3], [], [4], [5, 6], []]
    for content in contents:
        builder.add_item(torch.tensor(content, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "foreign.idx"))
    for packing in PACKINGS:
        data = samples(tmp_path / "foreign", packing=packing, seq_length=2, valid_fraction=0.0)
        stream = [int(t) for document in data.documents() for t in document]
        assert sorted(stream) == [1, 2, 3, 4, 5, 6]
        labels = [int(x) for i in range(len(data)) for x, m in zip(*data.sample(i)[1:3], strict=True) if m]
        expected = [2, 3, 6] if packing != "concat" else stream[1 : 1 + 2 * len(data)]
        assert sorted(labels) == sorted(expected)


def test_a_split_without_a_token_is_too_small(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "foreign.bin"), dtype=np.uint16)
    for content in [[1, 2, 3]] * 3 + [[]]:
        builder.add_item(torch.tensor(content, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "foreign.idx"))
    seed = next(s for s in range(99) if Permutation(4, s, "documents")(np.arange(4))[0] == 3)
    with pytest.raises(ValueError, match=r"the valid split of .* has 0 tokens in 1 documents"):
        samples(tmp_path / "foreign", seq_length=2, valid_fraction=0.25, seed=seed)


def test_a_folder_of_shards_is_one_corpus(tmp_path):
    for i, part in enumerate((SIZES[:10], SIZES[10:11], SIZES[11:])):
        with IndexedWriter(tmp_path / "shards" / f"part{i}", ByteTokenizer()) as writer:
            for size in part:
                writer.add(f"part{i}", list(range(size - 1)), size)
    corpus = Corpus(str(tmp_path / "shards"))
    assert (corpus.num_documents, corpus.num_tokens) == (40, sum(SIZES))
    every = np.arange(40)[::-1].copy()
    assert corpus.sizes(every).tolist() == SIZES[::-1]
    assert [corpus.tokens(d, 0, SIZES[d]).tolist() for d in (0, 9, 10, 11, 39)] == [
        [*range(SIZES[d] - 1), EOD] for d in (0, 9, 10, 11, 39)
    ]
    assert [corpus.name(d) for d in (9, 10, 12)] == [
        "part0 document 9",
        "part1 document 0",
        "part2 document 1",
    ]
    data = samples(tmp_path / "shards")
    assert sum(len(t) for t in data.documents()) == data.facts["tokens"]


def test_a_folder_without_data(tmp_path):
    with pytest.raises(ValueError, match=r"no data in .*: the folder holds no \.idx file"):
        Corpus(str(tmp_path))


@pytest.mark.parametrize("missing", [".idx", ".bin"])
def test_a_shard_that_is_not_whole_is_not_left_out(tmp_path, missing):
    write(tmp_path / "a", [5])
    write(tmp_path / "b", [5])
    (tmp_path / f"b{missing}").unlink()
    with pytest.raises(ValueError, match=rf"no data at .*/b: .*/b\{missing} is missing"):
        Corpus(str(tmp_path))


def test_shards_with_and_without_roles(tmp_path):
    write(tmp_path / "a", [5])
    write(tmp_path / "b", [5], roles=True)
    with pytest.raises(ValueError, match=r"mixes shards with and without \.roles"):
        Corpus(str(tmp_path))
