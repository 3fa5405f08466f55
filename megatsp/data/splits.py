"""From the configuration's sources to training, validation and test samples.

    a corpus's documents -> held out ones and the others -> samples of each -> a blend of all sources

What is held out of a corpus follows from the seed and its number of documents, whatever it is blended with.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatsp.data.blend import Blend, Source
from megatsp.data.corpus import Corpus
from megatsp.data.dataset import Reading, SampledCorpus
from megatsp.data.sample_index import DocumentOrder, open_index
from megatsp.data.source_list import read_sources
from megatsp.data.tokenizer import Tokenizer
from megatsp.schema import Config, DataConfig


@dataclass(frozen=True)
class Splits:
    """valid, test: None where nothing was held out. key: equal where train's samples and their order are."""

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
    data = config.data
    held_out = {
        "valid": 0.0 if data.valid_path else data.valid_fraction,
        "test": 0.0 if data.test_path else data.test_fraction,
    }
    corpora: dict[str, Corpus] = {}

    def blend(name: str, own: Sequence[str]) -> Blend | None:
        """own: sources of this split alone; else it is a part of data.path."""
        if name != "train" and not own and not held_out[name]:
            return None
        weights, paths = read_sources(own or data.path)
        parts = []
        for path in paths:
            if path not in corpora:
                corpora[path] = Corpus(path)
            corpus = corpora[path]
            corpus.check(tokenizer, config.model.vocab_size)
            begin, end = (0, corpus.num_documents) if own else _range(corpus, name, held_out)
            parts.append(_samples(config, corpus, begin, end, tokenizer))
            if not len(parts[-1]):
                raise ValueError(_too_small(config, name, path, parts[-1]))
        shares = np.array(weights or [len(part) for part in parts], np.float64)
        shares /= shares.sum()
        sources = [Source(*each) for each in zip(paths, shares.tolist(), parts, strict=True)]
        return Blend(sources, config.trainer.seed)

    valid, test, train = blend("valid", data.valid_path), blend("test", data.test_path), blend("train", [])
    assert train is not None
    described = [[s.weight, s.samples.corpus.key, *s.samples.documents_range] for s in train.sources]
    how = [data.packing, data.long_documents, data.reset_attention_mask, data.loss_on]
    text = json.dumps([described, how, config.trainer.seq_length, config.trainer.seed])
    return Splits(train, valid, test, hashlib.sha256(text.encode()).hexdigest())


def split_documents(
    num_documents: int, valid_fraction: float, test_fraction: float = 0.0
) -> dict[str, tuple[int, int]]:
    """By split: its range [begin, end) of the documents' seeded order."""
    valid, test = (round(num_documents * fraction) for fraction in (valid_fraction, test_fraction))
    return {"valid": (0, valid), "test": (valid, valid + test), "train": (valid + test, num_documents)}


def _range(corpus: Corpus, name: str, fractions: dict[str, float]) -> tuple[int, int]:
    begin, end = split_documents(corpus.num_documents, fractions["valid"], fractions["test"])[name]
    if end <= begin:
        raise ValueError(
            f"{corpus.source}: data.valid_fraction {fractions['valid']} and data.test_fraction "
            f"{fractions['test']} of {corpus.num_documents} documents leave none for the {name} split: "
            "give more documents, other fractions, or data.valid_path and data.test_path"
        )
    return begin, end


def _samples(config: Config, corpus: Corpus, begin: int, end: int, tokenizer: Tokenizer) -> SampledCorpus:
    data, seq_length, seed = config.data, config.trainer.seq_length, config.trainer.seed
    order = DocumentOrder(corpus.num_documents, seed, begin, end)
    index = open_index(corpus, order, seed, seq_length, data.packing, data.long_documents, data.cache)
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
