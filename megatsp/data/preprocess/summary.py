"""What a job has done, for people and for PREFIX.json."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatsp import __version__
from megatsp.data.indexed import CorpusInfo
from megatsp.data.preprocess.arguments import Options
from megatsp.data.preprocess.part import NUM_EXAMPLES, Part
from megatsp.data.token_files import Counts


def facts(
    options: Options, output: str, counts: Counts, parts: Sequence[Part], seconds: float
) -> dict[str, Any]:
    """What PREFIX.json records beside its CorpusInfo."""
    worker_s = sum(part.seconds for part in parts)
    return {
        "megatsp_version": __version__,
        "input": [options.dataset] if options.dataset else list(options.input),
        "input_bytes": sum(part.input_bytes for part in parts),
        "format": options.format,
        "json_key": output if options.format == "text" else None,
        "append_eod": options.append_eod,
        "bytes_per_token": counts.bytes / counts.tokens,
        "reject_examples": examples(parts),
        "partitions": len(parts),
        "workers": options.workers,
        "seconds": round(seconds, 3),
        "worker_seconds": round(worker_s, 3),
        "mb_per_s_per_worker": round(text_bytes(parts) / 1e6 / max(worker_s, 1e-9), 3),
    }


def show(
    options: Options, spec: str, infos: Mapping[str, CorpusInfo], parts: Sequence[Part], seconds: float
) -> None:
    """Prints the summary."""
    for output, prefix in options.outputs.items():
        info = infos[output]
        print(
            f"wrote {prefix}: {info.documents} documents, {info.tokens} tokens, {info.bytes} bytes of text, "
            f"{info.bytes / info.tokens:.3f} bytes per token"
        )
    listed = ", ".join(f"{count} {reason}" for reason, count in rejects(parts).items())
    print(f"left out: {listed or 'nothing'}")
    for example in examples(parts):
        print(f"  {example}")
    worker_s = sum(part.seconds for part in parts)
    print(
        f"{seconds:.1f} s, {text_bytes(parts) / 1e6 / max(worker_s, 1e-9):.2f} MB/s of text in each of "
        f"{options.workers} workers, {len(parts)} partitions"
    )
    if options.format == "text" and not options.append_eod:
        print("documents do not end with eod: without --append-eod a model does not see where one ends")
    for output, prefix in options.outputs.items():
        print(f"use: data.path={prefix} data.tokenizer={spec} model.vocab_size={infos[output].vocab_size}")


def rejects(parts: Sequence[Part]) -> dict[str, int]:
    """Records that were left out, by reason, the most frequent first."""
    total = Counter[str]()
    for part in parts:
        total.update(part.rejects)
    return dict(total.most_common())


def text_bytes(parts: Sequence[Part]) -> int:
    """UTF-8 bytes of all outputs."""
    return sum(count.bytes for part in parts for count in part.counts.values())


def examples(parts: Sequence[Part]) -> list[str]:
    """The first bad records."""
    return [example for part in parts for example in part.examples][:NUM_EXAMPLES]
