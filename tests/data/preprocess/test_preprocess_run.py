import json
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from preprocess_jobs import TEXTS, InlinePool, documents, json_lines, preprocess, write_inputs, write_parquet
from waiting import LIMIT_S, wait_until

with warnings.catch_warnings():  # it misses packages that it does not need for this
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatsp import cli
from megatsp.data.indexed import IndexedDocuments, read_info
from megatsp.data.preprocess import folder, run
from megatsp.data.preprocess.part import BadRecord
from megatsp.data.tokenizer import ByteTokenizer, train_bpe

KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "folder", "dataset", "several"]


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Pool", InlinePool)


def files(prefix: Path) -> dict[str, bytes]:
    """Those of the outputs that do not depend on when they were made."""
    found = prefix.parent.glob(f"{prefix.name}_*")
    return {path.name: path.read_bytes() for path in found if path.suffix in (".bin", ".idx", ".inputs")}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("kind", KINDS)
def test_partitions_do_not_change_the_output(kind: str, tmp_path: Path) -> None:
    given = write_inputs(kind, tmp_path / "in")
    outputs = []
    for count in (1, 3, 7):
        prefix = tmp_path / str(count) / "out"
        preprocess(prefix, *given, "--partitions", count)
        assert documents(prefix) == TEXTS
        outputs.append(files(prefix))
        names = {path.name for path in prefix.parent.iterdir()}
        assert names == {f"out_text_document.{suffix}" for suffix in ("bin", "idx", "inputs", "json")}
    assert outputs[0] == outputs[1] == outputs[2]
    theirs = IndexedDataset(str(tmp_path / "7" / "out_text_document"))
    assert [bytes(theirs[i].astype("u1")).decode() for i in range(len(theirs))] == TEXTS


@pytest.mark.parametrize("kind", ["several", "dataset"])
def test_workers_do_not_change_the_output(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = write_inputs(kind, tmp_path / "in")
    for workers in (1, 2):
        options = ("--partitions", 5, "--workers", workers, "--append-eod", "--log-interval", 0)
        with monkeypatch.context() as patched:
            if kind == "dataset" and workers == 1:  # each process needs seconds to import the library
                patched.setattr(run, "Pool", InlinePool)
            preprocess(tmp_path / f"w{workers}" / "out", *given, *options)
    assert documents(tmp_path / "w1" / "out") == TEXTS
    assert files(tmp_path / "w1" / "out") == files(tmp_path / "w2" / "out")
    printed = capfd.readouterr()
    assert re.search(
        r"[\d.]+ of [\d.]+ MB, [\d.]+ MB/s, \d+ documents, \d+ tokens, 0:00:\d\d left", printed.err
    )
    assert "use: data.path=" in printed.out and "documents do not end with eod" not in printed.out


@pytest.mark.usefixtures("inline")
def test_summary_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "abc"}\n{"text": ""}\n[]\n{"text": "d"}\n[1]\n')
    preprocess(tmp_path / "out", "--input", path, "--on-error", "skip", "--partitions", 2)
    printed = capsys.readouterr().out
    assert "2 documents, 4 tokens, 4 bytes of text, 1.000 bytes per token" in printed
    assert "left out: 2 no JSON object, 1 empty document" in printed
    assert f"  {path} line 2: empty document\n  {path} line 3: no JSON object: it is a list\n" in printed
    assert "documents do not end with eod" in printed
    prefix = f"{tmp_path}/out_text_document"
    assert f"use: data.path={prefix} data.tokenizer=byte model.vocab_size=257" in printed
    info = read_info(prefix)
    assert info.rejects == {"no JSON object": 2, "empty document": 1}
    assert (info.documents, info.tokens, info.bytes, info.max_token_id) == (2, 4, 4, 100)
    assert info.tokenizer_fingerprint == ByteTokenizer().fingerprint
    content = json.loads(Path(f"{prefix}.json").read_text())
    assert (content["append_eod"], content["json_key"], content["partitions"]) == (False, "text", 2)
    assert len(content["reject_examples"]) == 3 and content["input_bytes"] == path.stat().st_size
    assert IndexedDocuments(prefix).name(1) == f"{path} document 1"


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("damage", ["row group", "column"])
def test_what_is_left_out_does_not_depend_on_partitions(damage: str, tmp_path: Path) -> None:
    path, left = tmp_path / "a.parquet", TEXTS
    if damage == "row group":
        write_parquet(path, {"text": TEXTS})
        content = bytearray(path.read_bytes())
        at = content.index(b"text 30")
        content[at - 40 : at] = bytes(40)
        path.write_bytes(content)
        left = TEXTS[:28] + TEXTS[35:]
    else:
        write_parquet(path, {"txt": TEXTS})
    (tmp_path / "b.jsonl").write_bytes(json_lines(["after"]))
    infos = []
    for count in (1, 3, 7):
        prefix = tmp_path / f"out{count}"
        given = ("--input", path, tmp_path / "b.jsonl", "--on-error", "skip")
        preprocess(prefix, *given, "--partitions", count)
        assert documents(prefix) == ([*left, "after"] if damage == "row group" else ["after"])
        content = json.loads(Path(f"{prefix}_text_document.json").read_text())
        infos.append((content["rejects"], content["reject_examples"]))
    assert infos[0] == infos[1] == infos[2]
    assert infos[0][0] == {"unreadable rows" if damage == "row group" else "no column text": 1}


@pytest.mark.usefixtures("inline")
def test_several_keys(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", {"a": TEXTS, "n": list(range(60)), "b": TEXTS[::-1]})
    preprocess(
        tmp_path / "out", "--input", tmp_path / "in.parquet", "--json-keys", "b", "a", "--partitions", 4
    )
    assert documents(tmp_path / "out", "a") == TEXTS == documents(tmp_path / "out", "b")[::-1]


def test_a_failing_partition_ends_the_job_and_the_others_are_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(json_lines() + b"broken\n" + json_lines())
    given = [
        "preprocess",
        "--input",
        str(path),
        "--output-prefix",
        str(tmp_path / "out"),
        "--tokenizer",
        "byte",
    ]
    assert cli.main([*given, "--partitions", "8"]) == 2
    assert f"megatsp: error: {path} line 61: broken JSON: Expecting value" in capfd.readouterr().err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in.jsonl", "out.parts"}
    kept = {path.name for path in (tmp_path / "out.parts").iterdir()}
    assert {"000000.json", "000000_text.bin", "job.json"} <= kept and not any(".tmp" in name for name in kept)
    assert cli.main([*given, "--partitions", "8", "--on-error", "skip"]) == 0
    assert re.search(r"going on: [1-7] of 8 partitions are finished", capfd.readouterr().err)
    assert documents(tmp_path / "out") == TEXTS * 2


@pytest.mark.usefixtures("inline")
def test_what_is_there_is_kept_or_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write_inputs("jsonl", tmp_path / "in")
    prefix = tmp_path / "out"
    preprocess(prefix, *given)
    written = (tmp_path / "out_text_document.bin").stat().st_mtime_ns
    preprocess(prefix, *given, "--partitions", 3, "--workers", 2)
    assert "kept " in capsys.readouterr().out
    assert (tmp_path / "out_text_document.bin").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="holds data of other inputs or options; --force"):
        preprocess(prefix, *given, "--append-eod")
    preprocess(prefix, *given, "--append-eod", "--force")
    assert documents(prefix) == TEXTS
    (tmp_path / "out_text_document.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated.*--force"):
        preprocess(prefix, *given, "--append-eod")
    for suffix in ("json", "inputs"):  # as Megatron writes it
        (tmp_path / f"out_text_document.{suffix}").unlink()
    with pytest.raises(ValueError, match=r"out_text_document\.bin is there; --force"):
        preprocess(prefix, *given)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("change", ["shorter", "longer", "touched", "gone"])
def test_an_input_that_changes_meanwhile(
    policy: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prefix = tmp_path / "in.jsonl", tmp_path / "out"
    path.write_bytes(json_lines())
    content = path.read_bytes()
    half = content.index(b"\n", len(content) // 2) + 1

    class Changing(InlinePool):
        def run(self, *arguments: Any) -> Any:
            for number, result in enumerate(super().run(*arguments)):
                if number == 0 and change == "shorter":
                    path.write_bytes(content[:half])
                yield result
            if change == "longer":
                path.write_bytes(content + b'{"text": "more"}\n')
            elif change == "touched":
                path.write_bytes(content[::-1])
            elif change == "gone":
                path.unlink()

    monkeypatch.setattr(run, "Pool", Changing)
    said = {
        "shorter": rf"in\.jsonl: the file ended at byte {half} of \d+: it changed while it was read",
        "gone": r"cannot read .*in\.jsonl: No such file",
    }.get(change, r"in\.jsonl changed while it was read")
    with pytest.raises(ValueError, match=said):
        preprocess(prefix, "--input", path, "--partitions", 3, "--on-error", policy)
    assert not list(tmp_path.glob("out_text_document*"))


@pytest.mark.usefixtures("inline")
def test_an_interruption_while_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = write_inputs("jsonl", tmp_path / "in")
    prefix, rename = tmp_path / "out", os.replace

    def rename_until_the_index(source: str, target: str) -> None:
        if target.endswith("_document.idx"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", rename_until_the_index)
    with pytest.raises(KeyboardInterrupt):
        preprocess(prefix, *given, "--partitions", 3)
    with pytest.raises(ValueError, match="is missing"):
        IndexedDocuments(f"{prefix}_text_document")
    monkeypatch.setattr(os, "replace", rename)
    (tmp_path / "out_text_document.bin.99999.tmp").write_bytes(b"of a command that was killed")
    preprocess(prefix, *given, "--partitions", 3)
    assert documents(prefix) == TEXTS
    assert {path.name for path in tmp_path.iterdir()} == {
        "in",
        *(f"out_text_document.{suffix}" for suffix in ("bin", "idx", "inputs", "json")),
    }


@pytest.mark.usefixtures("inline")
def test_partitions_of_another_job_are_refused(tmp_path: Path) -> None:
    given = write_inputs("jsonl", tmp_path / "in")
    prefix = tmp_path / "out"
    preprocess(prefix, *given, "--partitions", 3, "--keep-partitions")
    parts = tmp_path / "out.parts"
    for path in tmp_path.glob("out_text_document.*"):
        path.unlink()
    for more, message in [
        (("--partitions", 2), "with other partitions:"),
        (("--partitions", 3, "--append-eod"), "with other append-eod:"),
    ]:
        with pytest.raises(ValueError, match=message):
            preprocess(prefix, *given, *more)
    os.utime(tmp_path / "in" / "data.jsonl", ns=(1, 1))
    with pytest.raises(
        ValueError, match=r"out\.parts holds finished partitions of another job, with other inputs:"
    ):
        preprocess(prefix, *given, "--partitions", 3)
    preprocess(prefix, *given, "--partitions", 3, "--force")
    assert documents(prefix) == TEXTS and not parts.exists()

    parts.mkdir()
    (parts / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"thesis\.txt, which is none of ours"):
        preprocess(prefix, *given, "--force")
    assert (parts / "thesis.txt").exists()


@pytest.mark.usefixtures("inline")
def test_the_policy_may_change_where_nothing_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(json_lines() + b"broken\n")
    given = ("--input", tmp_path / "in.jsonl", "--partitions", 3, "--keep-partitions")
    preprocess(tmp_path / "out", *given, "--on-error", "skip")
    with pytest.raises(ValueError, match="made with --on-error skip and lacks 1 bad records; --force"):
        preprocess(tmp_path / "out", *given)
    for path in tmp_path.glob("out_text_document.*"):
        path.unlink()
    with pytest.raises(BadRecord, match="line 61: broken JSON"):  # the partition is made again
        preprocess(tmp_path / "out", *given)
    assert "going on: 2 of 3" in capsys.readouterr().err

    (tmp_path / "in.jsonl").write_bytes(json_lines())
    preprocess(tmp_path / "all", *given)
    capsys.readouterr()
    preprocess(tmp_path / "all", *given, "--on-error", "skip")
    assert capsys.readouterr().out.startswith("kept ")


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("more", [(), ("--force",)])
def test_force_goes_on_where_it_was(
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*write_inputs("jsonl", tmp_path / "in"), "--partitions", 3, "--keep-partitions"]
    prefix = tmp_path / "out"
    preprocess(prefix, *given)
    (tmp_path / "out.parts" / "000001.json").write_text("not what force wants")

    class Killed(InlinePool):
        def run(self, *arguments: Any) -> Any:
            yield next(super().run(*arguments))
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "Pool", Killed)
        with pytest.raises(KeyboardInterrupt):
            preprocess(prefix, *given, "--append-eod", "--force")
    assert len(marks(prefix)) == 1
    capsys.readouterr()
    preprocess(prefix, *given, "--append-eod", *more)
    assert "going on: 1 of 3 partitions are finished" in capsys.readouterr().err
    assert json.loads((tmp_path / "out_text_document.json").read_text())["append_eod"]
    preprocess(prefix, *given, "--append-eod")
    assert capsys.readouterr().out.startswith("kept ")
    preprocess(prefix, *given, "--append-eod", "--force")
    assert "going on" not in capsys.readouterr().err


@pytest.mark.usefixtures("inline")
def test_a_job_without_a_finished_partition_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"broken\n")
    with pytest.raises(BadRecord):
        preprocess(tmp_path / "out", "--input", tmp_path / "in.jsonl")
    (tmp_path / "in.jsonl").write_bytes(json_lines())
    preprocess(tmp_path / "out", "--input", tmp_path / "in.jsonl")
    assert documents(tmp_path / "out") == TEXTS


@pytest.mark.parametrize("where", ["/proc/nothing/x", "in.jsonl/x"])
def test_an_output_that_cannot_be(where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_bytes(json_lines())
    given = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", "byte"]
    assert cli.main(["preprocess", "--output-prefix", str(tmp_path / where), *given]) == 2
    assert re.search(r"--output-prefix: cannot write to .*/x\.parts: ", capfd.readouterr().err)


def test_one_command_at_a_time(tmp_path: Path) -> None:
    def held() -> folder.PartsFolder:
        return folder.PartsFolder(str(tmp_path / "out.parts"), {"a": "b"}, False)

    with held(), pytest.raises(ValueError, match="another megatsp preprocess writes"), held():
        pass
    with held():
        pass


@pytest.mark.usefixtures("inline")
def test_nothing_is_left_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": ""}\n')
    with pytest.raises(ValueError, match=r"no document is left \(1 empty document\)"):
        preprocess(tmp_path / "out", "--input", tmp_path / "in.jsonl", "--on-error", "skip")
    (tmp_path / "in.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no document is left \(no records\)"):
        preprocess(tmp_path / "out", "--input", tmp_path / "in.jsonl", "--force")


# A job that is slow enough to be interrupted: a BPE, at a few MB/s.


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("slow")
    words = " ".join(f"{i * i * i} word{i % 97}" for i in range(20_000))
    train_bpe([words], 400, where / "tokenizer.json")
    (where / "in.jsonl").write_bytes(json_lines([words[i * 100 : i * 100 + 20_000] for i in range(100)]))
    return where


def command(slow: Path, prefix: Path, *more: str) -> list[str]:
    options = ["--input", str(slow / "in.jsonl"), "--tokenizer", str(slow / "tokenizer.json"), *more]
    return [sys.executable, "-m", "megatsp", "preprocess", "--output-prefix", str(prefix), *options]


def start(slow: Path, prefix: Path, *more: str, **settings: Any) -> subprocess.Popen[str]:
    """A command that has finished its first partition and is at work on others."""
    process = subprocess.Popen(
        command(slow, prefix, "--partitions", "12", *more), stderr=subprocess.PIPE, text=True, **settings
    )

    def is_at_work() -> bool:
        assert process.poll() is None, "it was over before"
        return bool(marks(prefix) and workers_of(prefix, but=process.pid))

    wait_until(is_at_work, "a partition is finished and another one is not")
    return process


def marks(prefix: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in Path(f"{prefix}.parts").glob("[0-9]*.json")}


def workers_of(prefix: Path, but: int = 0) -> list[int]:
    """Processes that hold a file in the folder of partitions."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(f"{prefix}.parts/") for name in held) and int(process.name) != but:
            found.append(int(process.name))
    return found


def wait_until_none_is_left(prefix: Path) -> None:
    wait_until(lambda: not workers_of(prefix), lambda: f"{workers_of(prefix)} have ended")


@pytest.fixture(scope="module")
def expected(slow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    prefix = tmp_path_factory.mktemp("expected") / "out"
    subprocess.run(command(slow, prefix), check=True, capture_output=True)
    return files(prefix)


def test_going_on_after_kill_9(slow: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    process = start(slow, prefix, "--workers", "2")
    process.kill()
    process.communicate()
    wait_until_none_is_left(prefix)
    before = marks(prefix)
    assert 0 < len(before) < 12 and not list(tmp_path.glob("out_text_document*"))
    again = subprocess.run(
        command(slow, prefix, "--partitions", "12", "--keep-partitions"),
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"going on: {len(before)} of 12 partitions are finished" in again.stderr
    assert before.items() <= marks(prefix).items() and len(marks(prefix)) == 12
    assert files(prefix) == expected


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c(slow: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    process = start(slow, prefix)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert re.search(
        r"interrupted; \d+ of 12 partitions are finished and kept in .*; the same command goes on", err
    )
    assert "Traceback" not in err and not workers_of(prefix)
    assert not list(Path(f"{prefix}.parts").glob("*.tmp"))
    subprocess.run(command(slow, prefix, "--partitions", "12"), check=True, capture_output=True)
    assert files(prefix) == expected


def test_sigterm_to_all_processes(slow: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    process = start(slow, prefix, "--workers", "2")
    for pid in [*workers_of(prefix, but=process.pid), process.pid, process.pid]:  # as Slurm does
        os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143
    assert re.search(r"stopped by SIGTERM; \d+ of 12 partitions are finished .*the same command goes on", err)
    assert "Traceback" not in err and not workers_of(prefix)
    assert not list(Path(f"{prefix}.parts").glob("*.tmp"))
    subprocess.run(command(slow, prefix, "--partitions", "12"), check=True, capture_output=True)
    assert files(prefix) == expected


def test_a_worker_that_is_killed(slow: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    process = start(slow, prefix, "--workers", "2")
    while not (workers := workers_of(prefix, but=process.pid)):  # it may be between two partitions
        assert process.poll() is None
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert re.search(
        r"the worker of partition \d+ of 12 \(.*in\.jsonl\) was killed \(by hand, or by the out-of-memory",
        err,
    )
    assert "Traceback" not in err and not workers_of(prefix)
    assert not list(tmp_path.glob("out_text_document*"))


def test_a_full_disk(slow: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """No file may be longer than that: the partitions fit, what they are merged to does not."""
    prefix = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    arguments = command(slow, prefix, "--partitions", "12")
    process = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=limit)
    assert process.returncode == 2, process.stderr
    assert (
        "out_text_document.bin: File too large; 12 of 12 partitions are finished and kept" in process.stderr
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out.parts"}
    process = subprocess.run(command(slow, prefix, "--partitions", "12"), capture_output=True, text=True)
    assert process.returncode == 0 and "12 of 12 partitions are finished" in process.stderr
    assert files(prefix) == expected

    prefix = tmp_path / "in_a_worker"
    arguments = command(slow, prefix, "--partitions", "2")
    process = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=limit)
    assert process.returncode == 2
    assert "in_a_worker.parts/000000_text.bin: File too large; 0 of 2 partitions" in process.stderr
    assert {path.name for path in (tmp_path / "in_a_worker.parts").iterdir()} == {"job.json", "lock"}
