"""From the configuration's sources to training, validation and test samples.

    a corpus's documents -> held out ones and the others -> samples of each -> a blend of all sources

What is held out of a corpus follows from the seed and its number of documents, whatever it is blended with.
"""

import hashlib
import json
from dataclasses import dataclass

from megatsp.data.blend import Blend, Source
from megatsp.data.corpus import Corpus
from megatsp.data.dataset import Reading, SampledCorpus
from megatsp.data.sample_index import DocumentOrder, open_index
from megatsp.data.sources import read_sources
from megatsp.data.tokenizer import Tokenizer
from megatsp.schema import Config, DataConfig

NAMES = ("valid", "test", "train")  # in the order in which they are taken out of a corpus


@dataclass(frozen=True)
class Splits:
    """valid and test: None where nothing was held out. key: equal where all samples and their order are."""

    train: Blend
    valid: Blend | None
    test: Blend | None
    key: str


def load_splits(config: Config, tokenizer: Tokenizer) -> Splits:
    """Opens the data of a validated configuration; builds what indices are missing.

    Raises:
        ValueError: data that is missing, damaged, of another tokenizer, too small for a sample, or without
            the roles that data.loss_on asks for.
    """
    data, seed = config.data, config.trainer.seed
    fractions = {
        "valid": 0.0 if data.valid_path else data.valid_fraction,
        "test": 0.0 if data.test_path else data.test_fraction,
    }
    given = {"train": data.path, "valid": data.valid_path or data.path, "test": data.test_path or data.path}
    found: dict[str, Blend | None] = {}
    corpora: dict[str, Corpus] = {}
    described = []
    for name in NAMES:
        own = {"valid": data.valid_path, "test": data.test_path}.get(name)
        if name != "train" and not own and not fractions[name]:
            found[name] = None
            continue
        sources = []
        weights, paths = read_sources(given[name])
        for path in paths:
            corpus = corpora.setdefault(path, Corpus(path))
            corpus.check(tokenizer, config.model.vocab_size)
            begin, end = (0, corpus.num_documents) if own else _held_out(corpus, fractions)[name]
            samples = _samples(
                config, corpus, DocumentOrder(corpus.num_documents, seed, begin, end), tokenizer
            )
            if not len(samples):
                raise ValueError(_too_small(config, name, path, samples))
            sources.append(samples)
            described.append([name, corpus.key, begin, end])
        shares = weights or [float(len(samples)) for samples in sources]
        total = sum(shares)
        found[name] = Blend(
            [Source(p, w / total, s) for p, w, s in zip(paths, shares, sources, strict=True)], seed
        )
        described.append([name, shares])
    how = [
        data.packing,
        data.long_documents,
        data.reset_attention_mask,
        data.loss_on,
        config.trainer.seq_length,
    ]
    key = hashlib.sha256(json.dumps([described, how, seed]).encode()).hexdigest()
    train = found["train"]
    assert train is not None
    return Splits(train, found["valid"], found["test"], key)


def split_documents(
    num_documents: int, valid_fraction: float, test_fraction: float = 0.0
) -> dict[str, tuple[int, int]]:
    """By split: its range [begin, end) of the documents' seeded order."""
    valid, test = (round(num_documents * fraction) for fraction in (valid_fraction, test_fraction))
    return {"valid": (0, valid), "test": (valid, valid + test), "train": (valid + test, num_documents)}


def _held_out(corpus: Corpus, fractions: dict[str, float]) -> dict[str, tuple[int, int]]:
    ranges = split_documents(corpus.num_documents, fractions["valid"], fractions["test"])
    for name, (begin, end) in ranges.items():
        if end <= begin and (name == "train" or fractions[name]):
            raise ValueError(
                f"{corpus.source}: data.valid_fraction {fractions['valid']} and data.test_fraction "
                f"{fractions['test']} of {corpus.num_documents} documents leave {max(0, end - begin)} for "
                f"the {name} split: give more documents, other fractions, or data.valid_path and test_path"
            )
    return ranges


def _samples(config: Config, corpus: Corpus, order: DocumentOrder, tokenizer: Tokenizer) -> SampledCorpus:
    data, seq_length = config.data, config.trainer.seq_length
    index = open_index(
        corpus, order, config.trainer.seed, seq_length, data.packing, data.long_documents, data.cache
    )
    apart = data.packing != "concat" or data.reset_attention_mask
    reading = Reading(seq_length, apart, _loss_on(data, corpus), tokenizer.eod, config.model.vocab_size)
    return SampledCorpus(corpus, order, index, data.packing, reading)


def _loss_on(data: DataConfig, corpus: Corpus) -> str:
    if data.loss_on == "auto":
        return "assistant" if corpus.has_roles else "all"
    if data.loss_on != "all" and not corpus.has_roles:
        raise ValueError(
            f"data.loss_on={data.loss_on}: {corpus.source} does not say who speaks (it has no .roles); use "
            "data.loss_on=all, or prepare it with --format chat, prompt or instruction"
        )
    return data.loss_on


def _too_small(config: Config, name: str, path: str, samples: SampledCorpus) -> str:
    facts, seq_length = samples.facts, config.trainer.seq_length
    if config.data.packing == "concat":
        return (
            f"the {name} split of {path} has {facts['tokens']} tokens in {facts['documents']} documents, one "
            f"sample of seq_length {seq_length} needs {seq_length + 1}: lower seq_length, change "
            f"data.valid_fraction ({config.data.valid_fraction}), or prepare more data"
        )
    return (
        f"the {name} split of {path} has no sample: of {facts['documents']} documents {facts['dropped']} are "
        f"longer than seq_length {seq_length} (data.long_documents=drop), {facts['empty']} have fewer than "
        "two tokens"
    )
