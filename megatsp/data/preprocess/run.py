"""A whole job: partitions are made by workers, kept where the job is interrupted, and merged at the end."""

import glob
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatsp.data import token_files
from megatsp.data.indexed import CorpusInfo, IndexedDocuments, commit, read_info, temporary_name
from megatsp.data.preprocess import plan, summary
from megatsp.data.preprocess.arguments import Options
from megatsp.data.preprocess.folder import PartsFolder, is_forced, is_of_job
from megatsp.data.preprocess.inputs import TEXT, InputFile, Rows, check_unchanged, find, load_rows
from megatsp.data.preprocess.part import Part, Setup, path_of, read_part
from megatsp.data.preprocess.pool import Pool, WorkerDied
from megatsp.data.preprocess.progress import Progress
from megatsp.data.preprocess.sources import Piece
from megatsp.data.token_files import Counts
from megatsp.data.tokenizer import Tokenizer, from_megatron, load_tokenizer

TICK_S = 0.5
TERMINATED = 143  # exit status after SIGTERM


class Terminated(BaseException):
    """SIGTERM came, for example from Slurm before it preempts a job."""


def preprocess(options: Options) -> int:
    """Does what the options say and returns the exit status: 0, 1 after a worker died, 143 after SIGTERM.

    Raises:
        ValueError: bad input, output that is in the way, or a full disk.
        KeyboardInterrupt: after saying how to go on.
    """
    try:
        with _terminable():
            return _preprocess(options)
    except Terminated:
        return TERMINATED


def _preprocess(options: Options) -> int:
    spec, tokenizer = _tokenizer(options)
    if options.format != "text":
        from megatsp.data.sft import Renderer

        Renderer(tokenizer, options.format, options.chat_template)  # refuses what every worker would
    inputs, dataset = _inputs(options)
    cut = plan.partitions(inputs, options.partitions)
    job = _job(options, tokenizer, inputs, cut)
    source = plan.source_of(job)
    parts_path = f"{options.output_prefix}.parts"
    replace = options.force or is_forced(parts_path, job)
    if not replace and _is_there(options, source, is_of_job(parts_path, job)):
        print(f"kept {', '.join(options.outputs.values())}: made from the same inputs and options")
        return 0
    setup = Setup(
        folder=parts_path,
        tokenizer=spec,
        fingerprint=tokenizer.fingerprint,
        json_keys=options.json_keys,
        format=options.format,
        chat_template=options.chat_template,
        append_eod=options.append_eod,
        skip=options.on_error == "skip",
        max_document_bytes=options.max_document_bytes,
        dataset=dataset,
    )
    started = time.perf_counter()
    with PartsFolder(parts_path, job, options.force) as folder:
        try:
            parts = _make_parts(options, setup, tokenizer, cut)
            check_unchanged([file for file in inputs if isinstance(file, InputFile)])
            infos = _merge(options, setup, tokenizer, source, parts, time.perf_counter() - started)
        except WorkerDied as error:
            pieces = f" ({_range(cut[error.index])})" if error.index >= 0 and cut[error.index] else ""
            where = f" of partition {error.index + 1} of {len(cut)}{pieces}" if pieces else ""
            print(
                f"megatsp: error: the worker{where} {error}; {_kept(setup, tokenizer, cut)}", file=sys.stderr
            )
            return 1
        except KeyboardInterrupt:
            print(f"\nmegatsp: interrupted; {_kept(setup, tokenizer, cut)}", file=sys.stderr)
            raise
        except Terminated:
            print(f"megatsp: stopped by SIGTERM; {_kept(setup, tokenizer, cut)}", file=sys.stderr)
            raise
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
            raise ValueError(f"{what}; {_kept(setup, tokenizer, cut)}") from None
        finally:
            folder.sweep()
        for prefix in options.outputs.values():
            _sync_folder(os.path.dirname(prefix) or ".")
        if options.keep_partitions:
            folder.finish()
        else:
            folder.remove()
    summary.show(options, spec, infos, parts, time.perf_counter() - started)
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, once: more of them do not disturb what then cleans up and exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if not stopped:
            signal.signal(signal.SIGTERM, before)


def _tokenizer(options: Options) -> tuple[str, Tokenizer]:
    """The tokenizer and the spec by which workers, and training, find it."""
    if options.tokenizer is not None:
        return options.tokenizer, load_tokenizer(options.tokenizer)
    given = (options.tokenizer_model, options.vocab_file, options.merge_file)
    spec = from_megatron(options.tokenizer_type or "", *given)
    return spec, load_tokenizer(spec)


def _inputs(options: Options) -> tuple[list[InputFile | Rows], Any]:
    if options.dataset is not None:
        rows, dataset = load_rows(options.dataset, options.dataset_config, options.dataset_split)
        return [rows], dataset
    files = find(options.input, options.input_type)
    text = next((file.path for file in files if file.kind == TEXT), None)
    if text is not None and options.format != "text":
        raise ValueError(f"--format {options.format} needs records, but {text} is a text file")
    if text is not None and len(options.json_keys) > 1:
        raise ValueError(f"several --json-keys need records, but {text} is a text file")
    return [*files], None


def _job(
    options: Options, tokenizer: Tokenizer, inputs: Sequence[InputFile | Rows], cut: Sequence[Sequence[Piece]]
) -> dict[str, str]:
    names = ("json_keys", "format", "chat_template", "append_eod", "max_document_bytes")  # all but --on-error
    values = {name: getattr(options, name) for name in names}
    return plan.description(inputs, {"tokenizer": tokenizer.fingerprint, **values}, cut)


def _is_there(options: Options, source: str, begun: bool) -> bool:
    """Whether the outputs are there already.

    Args:
        begun: whether there are partitions of this job, so that files without a .json are from its end.

    Raises:
        ValueError: something else is there.
    """
    advice = "--force replaces it, another --output-prefix keeps it"
    found = []
    for prefix in options.outputs.values():
        if os.path.exists(f"{prefix}.json"):
            info = read_info(prefix)
            if info.source != source:
                raise ValueError(f"{prefix} holds data of other inputs or options; {advice}")
            if options.on_error == "fail" and info.rejects:
                left_out = sum(info.rejects.values())
                raise ValueError(
                    f"{prefix} was made with --on-error skip and lacks {left_out} bad records; {advice}"
                )
            try:
                IndexedDocuments(prefix)
            except ValueError as error:
                raise ValueError(f"{error}; {advice}") from None
            found.append(prefix)
        elif not begun and (there := [p for s in (".bin", ".idx") if os.path.exists(p := f"{prefix}{s}")]):
            raise ValueError(f"{there[0]} is there; {advice}")
    return len(found) == len(options.outputs)


def _make_parts(options: Options, setup: Setup, tokenizer: Tokenizer, cut: list[list[Piece]]) -> list[Part]:
    finished = {i: part for i in range(len(cut)) if (part := read_part(setup, i, tokenizer.vocab_size))}
    if finished:
        print(f"going on: {len(finished)} of {len(cut)} partitions are finished", file=sys.stderr)
    total_bytes = sum(piece.bytes for pieces in cut for piece in pieces)
    todo = [(i, pieces) for i, pieces in enumerate(cut) if i not in finished]
    with Progress(total_bytes, finished, options.log_interval) as progress:
        with Pool(options.workers, setup) as pool:
            for index, report in pool.run(todo, TICK_S):
                if report is not None:
                    progress.update(index, report.part)
                progress.tick()
        return [progress.parts[i] for i in range(len(cut))]


def _merge(
    options: Options,
    setup: Setup,
    tokenizer: Tokenizer,
    source: str,
    parts: list[Part],
    seconds: float,
) -> dict[str, CorpusInfo]:
    """Write the outputs; as long as the .json of one is missing, the partitions stand."""
    rejects = summary.rejects(parts)
    infos = {}
    for output, prefix in options.outputs.items():
        _sweep(prefix)
        counts = Counts()
        for part in parts:
            counts.add(part.counts[output])
        if not counts.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.items())
            raise ValueError(f"nothing to write at {prefix}: no document is left ({reasons or 'no records'})")

        def path(suffix: str, prefix: str = prefix) -> str:
            return temporary_name(prefix, suffix)

        try:
            places = [
                (path_of(setup.folder, i, output), part.counts[output].documents)
                for i, part in enumerate(parts)
            ]
            token_files.merge(places, path, setup.roles)
            more = summary.facts(options, output, counts, parts, seconds)
            infos[output] = commit(prefix, path, tokenizer, counts, source, setup.roles, rejects, more)
        except OSError as error:
            if error.filename is None:  # what writes to an open file does not name it
                error.filename = f"{prefix}.bin"
            raise
        finally:
            token_files.remove(path, setup.roles)
    return infos


def _sync_folder(path: str) -> None:
    """So that the names of the outputs outlast a power failure before the partitions go."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(descriptor)


def _sweep(prefix: str) -> None:
    """Remove what a killed command was about to merge."""
    ours = re.compile(re.escape(prefix) + r"\.(bin|sizes|inputs|roles|idx|json)\.\d+\.tmp")
    for path in glob.glob(f"{glob.escape(prefix)}.*.tmp"):
        if ours.fullmatch(path):
            Path(path).unlink(missing_ok=True)


def _kept(setup: Setup, tokenizer: Tokenizer, cut: Sequence[Sequence[Piece]]) -> str:
    finished = sum(read_part(setup, i, tokenizer.vocab_size) is not None for i in range(len(cut)))
    return (
        f"{finished} of {len(cut)} partitions are finished and kept in {setup.folder}; the same command goes "
        "on from there"
    )


def _range(pieces: Sequence[Piece]) -> str:
    first, last = pieces[0], pieces[-1]
    more = f" to {last.path}" if last.path != first.path else ""
    return f"{first.path}{more}"
