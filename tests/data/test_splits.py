from pathlib import Path

import pytest
from corpora import some_sizes, splits, write

from megatsp.data.source_list import read_sources
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import Config, DataConfig, TrainerConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i, name in enumerate("abc"):
        write(folder / name, some_sizes(20 + 10 * i, seed=i))
    write(folder / "tiny", [3, 4])
    return folder


@pytest.mark.parametrize(
    "given, weights, sources",
    [
        (["a"], None, ["a"]),
        (["a", "b", "c"], None, ["a", "b", "c"]),
        (["0.7", "a", "3e-1", "b"], [0.7, 0.3], ["a", "b"]),
        (["2", "./1"], [2.0], ["./1"]),
    ],
)
def test_lists_of_sources(given, weights, sources):
    assert read_sources(given) == (weights, sources)


@pytest.mark.parametrize(
    "given, message",
    [
        (["0.7", "a", "b"], "weight and source in turn"),
        (["0.7"], "weight and source in turn"),
        (["a", "0.7", "b", "0.3"], "weight and source in turn"),
        (["0.5", "0.5"], "weight and source in turn"),
        ([], "weight and source in turn"),
        (["0", "a", "1", "b"], "must be above 0"),
        (["-1", "a"], "must be above 0"),
        (["inf", "a"], "must be above 0"),
        (["nan", "a"], "must be above 0"),
    ],
)
def test_lists_that_are_no_sources(given, message):
    with pytest.raises(ValueError, match=message):
        read_sources(given)


def test_weights_are_shares(folder):
    train = splits(["3", f"{folder}/a", "1", f"{folder}/b"]).train
    assert [source.weight for source in train.sources] == [0.75, 0.25]
    assert [source.name for source in train.sources] == [f"{folder}/a", f"{folder}/b"]


def test_without_weights_every_sample_counts_alike(folder):
    train = splits([f"{folder}/{name}" for name in "abc"]).train
    lengths = [len(source.samples) for source in train.sources]
    assert [source.weight for source in train.sources] == pytest.approx([n / sum(lengths) for n in lengths])
    one_epoch = train.draw(0, len(train))
    assert len({(d.source, d.sample) for d in one_epoch}) > 0.95 * len(train)


def test_a_sources_split_does_not_depend_on_what_it_is_blended_with(folder):
    alone = splits(f"{folder}/b")
    mixed = splits(["0.9", f"{folder}/a", "0.1", f"{folder}/b"])
    for one, other in ((alone.train, mixed.train), (alone.valid, mixed.valid)):
        documents = [
            [t.tolist() for t in s.documents()] for s in (one.sources[0].samples, other.sources[1].samples)
        ]
        assert documents[0] == documents[1]


def test_sources_of_their_own_for_validation_and_test(folder):
    found = splits(f"{folder}/a", valid_path=[f"{folder}/b"], test_path=["1", f"{folder}/c"])
    sizes = [
        [s.samples.facts["documents"] for s in b.sources] for b in (found.train, found.valid, found.test)
    ]
    assert sizes == [[20], [30], [40]]  # nothing is held out of path


def test_nothing_held_out(folder):
    found = splits(f"{folder}/a", valid_fraction=0.0)
    assert found.valid is None and found.test is None
    assert found.train.sources[0].samples.facts["documents"] == 20


def test_the_key_tells_orders_of_samples_apart(folder):
    base = splits(f"{folder}/a").key
    others = [
        splits(f"{folder}/b"),
        splits([f"{folder}/a", f"{folder}/b"]),
        splits(["0.6", f"{folder}/a", "0.4", f"{folder}/b"]),
        splits(f"{folder}/a", seed=6),
        splits(f"{folder}/a", seq_length=17),
        splits(f"{folder}/a", packing="greedy"),
        splits(f"{folder}/a", valid_fraction=0.4),
        splits(f"{folder}/a", reset_attention_mask=True),
    ]
    assert len({base, *(other.key for other in others)}) == 1 + len(others)
    same = [
        splits(f"{folder}/a"),
        splits(["2.5", f"{folder}/a"]),
        splits(f"{folder}/../{folder.name}/a"),
        splits(f"{folder}/a", valid_path=[f"{folder}/b"], valid_fraction=0.0, num_workers=3),
    ]
    assert [found.key for found in same[:3]] == [base] * 3
    assert same[3].key != base  # it trains on what was held out


@pytest.mark.parametrize(
    "more, message",
    [
        (
            dict(path="tiny"),
            r"tiny: data.valid_fraction 0.2 .* of 2 documents leave none for the valid split",
        ),
        (dict(path="a", test_fraction=0.001), "leave none for the test split"),
        (dict(path="a", valid_fraction=0.99), "leave none for the train split"),
        (
            dict(path="a", seq_length=10**6),
            r"the valid split of .* one sample of seq_length 1000000 needs 1000001",
        ),
        (dict(path="missing"), "missing.bin is missing"),
        (dict(path="a", vocab_size=256), r"model.vocab_size is 256, but .* needs 257"),
        (
            dict(path="tiny", packing="pad", seq_length=1, long_documents="drop", valid_fraction=0.0),
            "has no sample",
        ),
    ],
)
def test_what_cannot_be_used(folder, more, message):
    with pytest.raises(ValueError, match=message):
        splits(f"{folder}/{more.pop('path')}", **more)


def test_another_tokenizers_data(folder):
    other = ByteTokenizer()
    other.name, other.fingerprint = "other", "0" * 64
    config = Config(data=DataConfig(path=[f"{folder}/a"]), trainer=TrainerConfig(seq_length=8))
    with pytest.raises(ValueError, match=r"another tokenizer: 'byte'.*this one is 'other'"):
        load_splits(config, other)
