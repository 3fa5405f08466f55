from pathlib import Path

import numpy as np
import pytest
import torch

from megatsp.data.dataset import (
    GPTDataset,
    Sampler,
    load_batch,
    rank_slices,
    split_documents,
)
from megatsp.data.indexed import IndexedWriter
from megatsp.data.tokenizer import ByteTokenizer

DOCUMENTS = 23


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Document i has i + 1 tokens, all equal to i."""
    with IndexedWriter(tmp_path / "data", ByteTokenizer()) as writer:
        for i in range(DOCUMENTS):
            writer.add(f"{i}.py", [i] * (i + 1), i + 1)
    return tmp_path / "data"


def dataset(
    prefix: Path, split: str = "train", seq_length: int = 7, fraction: float = 0.3, seed: int = 5
) -> GPTDataset:
    return GPTDataset(prefix, split, seq_length, ByteTokenizer(), fraction, seed)


def test_split_is_disjoint_complete_and_seeded() -> None:
    train, valid = split_documents(100, 0.07, 3)
    assert (len(train), len(valid)) == (93, 7)
    assert sorted([*train, *valid]) == list(range(100))
    assert np.array_equal(split_documents(100, 0.07, 3)[1], valid)
    assert not np.array_equal(split_documents(100, 0.07, 4)[1], valid)


@pytest.mark.parametrize(
    "documents, fraction", [(100, 0.0), (100, 1.0), (5, 0.05), (1, 0.5), (0, 0.5), (9, -0.5)]
)
def test_split_without_both_parts(documents: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"of {documents} documents"):
        split_documents(documents, fraction, 0)


@pytest.mark.parametrize("seq_length", [1, 2, 7, 50])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_samples_cover_the_stream(prefix: Path, split: str, seq_length: int) -> None:
    data = dataset(prefix, split, seq_length)
    stream = data.stream(0, data.num_tokens)
    assert len(data) == (len(stream) - 1) // seq_length
    for i in range(len(data)):
        expected = stream[i * seq_length : i * seq_length + seq_length + 1]
        assert data.sample(i).dtype == np.int64
        assert data.sample(i).tolist() == expected.tolist()
    assert len(stream) - 1 - len(data) * seq_length < seq_length


def test_stream_is_the_splits_documents_each_whole_and_followed_by_eod(prefix: Path) -> None:
    orders = {}
    for part, ids in zip(("train", "valid"), split_documents(DOCUMENTS, 0.3, 5), strict=True):
        data = dataset(prefix, part)
        pieces = np.split(stream := data.stream(0, data.num_tokens), np.flatnonzero(stream == 256) + 1)
        assert len(pieces.pop()) == 0
        orders[part] = [int(piece[0]) for piece in pieces]
        assert sorted(orders[part]) == ids.tolist()
        assert all(piece.tolist() == [piece[0]] * (piece[0] + 1) + [256] for piece in pieces)
    assert orders["train"] != sorted(orders["train"])  # shuffled


def test_seed_changes_the_order(prefix: Path) -> None:
    first = dataset(prefix).stream(0, 50).tolist()
    assert dataset(prefix).stream(0, 50).tolist() == first
    assert dataset(prefix, seed=6).stream(0, 50).tolist() != first


@pytest.mark.parametrize("seq_length", [1, 7, 50])
def test_documents_of_a_sample(prefix: Path, seq_length: int) -> None:
    data = dataset(prefix, seq_length=seq_length)
    stream = data.stream(0, data.num_tokens)
    # The document of a position is the id at the next position that is no eod, going back from an eod.
    owner = [int(stream[i - 1] if stream[i] == 256 else stream[i]) for i in range(len(stream))]
    for i in range(len(data)):
        owners = owner[i * seq_length : i * seq_length + seq_length + 1]
        assert data.documents(i) == [f"{d}.py document 0" for d in dict.fromkeys(owners)]


@pytest.mark.parametrize("index", [-1, 10**6])
def test_sample_out_of_range(prefix: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"sample {index} "):
        dataset(prefix).sample(index)
    with pytest.raises(IndexError, match=f"sample {index} "):
        dataset(prefix).documents(index)


def test_too_few_tokens(prefix: Path) -> None:
    available = dataset(prefix, "valid").num_tokens
    assert len(dataset(prefix, "valid", available - 1)) == 1
    with pytest.raises(
        ValueError, match=rf"has {available} tokens .* seq_length {available} needs {available + 1}"
    ):
        dataset(prefix, "valid", available)


@pytest.mark.parametrize(
    "arguments, message", [({"split": "test"}, "'train' or 'valid'"), ({"seq_length": 0}, "at least 1")]
)
def test_bad_arguments(prefix: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(prefix, **arguments)


def test_another_tokenizer_is_refused(prefix: Path) -> None:
    other = ByteTokenizer()
    other.name, other.fingerprint = "other", "0" * 64
    with pytest.raises(ValueError, match=r"another tokenizer: 'byte'.*this one is 'other'"):
        GPTDataset(prefix, "train", 7, other, 0.3, 5)


def test_vocabulary_smaller_than_the_datas_is_refused(prefix: Path) -> None:
    data = dataset(prefix)
    data.check_vocabulary(257)
    with pytest.raises(ValueError, match=r"vocab_size is 256, but .* needs 257"):
        data.check_vocabulary(256)


def test_an_id_beyond_the_tokenizers_vocabulary_is_refused(prefix: Path) -> None:
    path = prefix.with_name("data.json")
    path.write_text(path.read_text().replace('"max_token_id": 256', '"max_token_id": 300'))
    data = dataset(prefix)
    data.check_vocabulary(301)
    with pytest.raises(ValueError, match="largest id in the data is 300"):
        data.check_vocabulary(257)


def test_sampler_visits_every_sample_once_an_epoch_in_another_order() -> None:
    sampler = Sampler(seed=1, num_samples=11)
    epochs = sampler.indices(0, 33).reshape(3, 11)
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sampler.indices(0, 33).dtype == np.int64


def test_sampler_depends_on_the_cursor_alone() -> None:
    whole = Sampler(seed=1, num_samples=11).indices(0, 40)
    sampler = Sampler(seed=1, num_samples=11)
    for consumed, count in [
        (38, 2),
        (0, 5),
        (9, 20),
        (11, 11),
        (3, 0),
        (22, 1),
    ]:  # any order, over epoch ends
        assert np.array_equal(sampler.indices(consumed, count), whole[consumed : consumed + count])
    assert not np.array_equal(Sampler(seed=2, num_samples=11).indices(0, 40), whole)


def test_order_does_not_change_between_versions() -> None:
    """A checkpoint's cursor must mean the same samples under another NumPy."""
    assert Sampler(seed=1234, num_samples=8).indices(0, 16).reshape(2, 8).tolist() == [
        [4, 2, 6, 0, 3, 5, 1, 7],
        [0, 7, 4, 3, 1, 5, 2, 6],
    ]
    assert split_documents(20, 0.2, 1234)[1].tolist() == [13, 14, 15, 19]


def test_sampler_errors() -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        Sampler(0, 0)
    with pytest.raises(ValueError, match="seed is -1"):
        Sampler(-1, 3)
    with pytest.raises(ValueError, match="consumed is -1"):
        Sampler(0, 3).indices(-1, 1)


@pytest.mark.parametrize("micro_batch_size, dp_size", [(1, 1), (2, 3), (3, 2), (4, 3), (1, 12), (12, 1)])
def test_ranks_share_a_global_batch_that_does_not_depend_on_them(micro_batch_size: int, dp_size: int) -> None:
    batch = Sampler(seed=7, num_samples=50).indices(consumed=45, count=12)
    assert np.array_equal(batch, Sampler(seed=7, num_samples=50).indices(0, 57)[45:])
    slices = [rank_slices(batch, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    for rank, micro_batches in enumerate(slices):
        assert len(micro_batches) == 12 // (micro_batch_size * dp_size)
        for m, micro_batch in enumerate(micro_batches):
            first = (m * dp_size + rank) * micro_batch_size
            assert micro_batch.tolist() == batch[first : first + micro_batch_size].tolist()
    assert sorted(np.concatenate([m for micro in slices for m in micro])) == sorted(batch)


@pytest.mark.parametrize(
    "size, micro_batch_size, rank, dp_size, message",
    [
        (12, 5, 0, 1, "positive multiple"),
        (12, 4, 0, 2, "positive multiple"),
        (0, 1, 0, 1, "positive multiple"),
        (12, 0, 0, 1, "positive multiple"),
        (12, 2, 2, 2, "dp_rank is 2"),
        (12, 2, -1, 2, "dp_rank is -1"),
    ],
)
def test_rank_slices_errors(size: int, micro_batch_size: int, rank: int, dp_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_slices(np.arange(size), micro_batch_size, rank, dp_size)


def test_load_batch(prefix: Path) -> None:
    data = dataset(prefix)
    tokens, labels, loss_mask = load_batch(data, np.array([4, 0]))
    assert tokens.tolist() == [data.sample(4)[:-1].tolist(), data.sample(0)[:-1].tolist()]
    assert labels.tolist() == [data.sample(4)[1:].tolist(), data.sample(0)[1:].tolist()]
    assert torch.equal(loss_mask, torch.ones(2, 7))
    assert (tokens.dtype, labels.dtype, loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert tokens.is_contiguous() and labels.is_contiguous()


def test_reading_a_sample_does_not_read_the_corpus(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(prefix)
    read: list[int] = []
    original = type(data._corpus).tokens
    monkeypatch.setattr(
        type(data._corpus), "tokens", lambda self, i, *span: (read.append(i), original(self, i, *span))[1]
    )
    for i in range(len(data)):
        read.clear()
        data.sample(i)
        assert [f"{document}.py document 0" for document in read] == data.documents(i)


def test_spread_reaches_over_the_whole_split(prefix: Path) -> None:
    train = dataset(prefix, "train", 7)
    assert train.spread(3).tolist() == [0, len(train) // 3, 2 * len(train) // 3]
    assert train.spread(10**6).tolist() == list(range(len(train)))
