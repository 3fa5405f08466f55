"""What Megatron-LM's tools/preprocess_data.py does, for one JSON key, one partition and no sentences.

    python megatron_loop.py INPUT.jsonl OUTPUT_PREFIX TOKENIZER WORKERS

TOKENIZER: transformers:FOLDER (as Megatron's HuggingFaceTokenizer calls it), tokenizers:FOLDER (the library
below it, called directly), or byte (as Megatron's ByteLevelTokenizer).

Source: Megatron-LM, tools/preprocess_data.py (Encoder, Partition.process_json_file).
"""

import json
import multiprocessing
import sys
import time
from typing import Any

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

CHUNK = 32  # lines that a worker gets at once


class Encoder:
    """Lines to ids; `tokenizer` is set in each worker."""

    tokenizer: Any = None

    def __init__(self, spec: str) -> None:
        self._spec = spec

    def initializer(self) -> None:
        """In a worker, once."""
        Encoder.tokenizer = build_tokenizer(self._spec)

    def encode(self, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        """Ids and lengths by key, and the size of the line."""
        data = json.loads(line)
        ids, lengths = {}, {}
        for key in ("text",):
            document: list[int] = []
            sentence_lengths = []
            for sentence in [data[key]]:
                sentence_ids = Encoder.tokenizer.tokenize(sentence)
                if len(sentence_ids) > 0:
                    document.extend(sentence_ids)
                    sentence_lengths.append(len(sentence_ids))
            if len(document) > 0:
                document.append(Encoder.tokenizer.eod)
                sentence_lengths[-1] += 1
            ids[key], lengths[key] = document, sentence_lengths
        return ids, lengths, len(line)


class Transformers:
    """As Megatron's HuggingFaceTokenizer."""

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.eod, self.vocab_size = self._tokenizer.eos_token_id, len(self._tokenizer)

    def tokenize(self, text: str) -> list[int]:
        """Its ids."""
        return list(self._tokenizer(text).input_ids)


class Tokenizers:
    """The tokenizers library without transformers."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")
        self.eod, self.vocab_size = 0, self._tokenizer.get_vocab_size()

    def tokenize(self, text: str) -> list[int]:
        """Its ids."""
        return list(self._tokenizer.encode(text).ids)


class Bytes:
    """As Megatron's ByteLevelTokenizer, with our eod."""

    eod, vocab_size = 256, 257

    def tokenize(self, text: str) -> list[int]:
        """Its ids."""
        return list(text.encode("utf-8"))


def build_tokenizer(spec: str) -> Any:
    """The tokenizer that the command line names."""
    kind, _, path = spec.partition(":")
    return {"transformers": Transformers, "tokenizers": Tokenizers}[kind](path) if path else Bytes()


def main(source: str, prefix: str, spec: str, workers: int) -> None:
    """Tokenise a file."""
    started = time.time()
    with open(source, encoding="utf-8") as lines:
        encoder = Encoder(spec)
        tokenizer = build_tokenizer(spec)
        pool = multiprocessing.Pool(workers, initializer=encoder.initializer)
        encoded = pool.imap(encoder.encode, lines, CHUNK)
        builder = IndexedDatasetBuilder(
            f"{prefix}_text_document.bin",
            dtype=DType.optimal_dtype(tokenizer.vocab_size),
        )
        total_bytes, loop_started = 0, time.time()
        for number, (document, lengths, line_bytes) in enumerate(encoded, start=1):
            total_bytes += line_bytes
            for key in document:
                builder.add_document(document[key], lengths[key])
            if number % 1000 == 0:
                elapsed = time.time() - loop_started
                rates = f"{number / elapsed} docs/s, {total_bytes / elapsed / 1e6} MB/s"
                print(f"Processed {number} documents ({rates}).")
        builder.finalize(f"{prefix}_text_document.idx")
        pool.close()
        pool.join()
    print(f"{time.time() - started:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
