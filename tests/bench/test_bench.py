"""`megatsp bench` as a user runs it: whole, with schemes that fail, and interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import RANK_VARIABLES
from waiting import LIMIT_S, hang, wait_until

from megatsp import cli
from megatsp.bench import runner
from megatsp.bench.command import make_row
from megatsp.bench.measure import REFERENCES
from megatsp.bench.schemes import make_cases, parse_schemes

TINY = (
    "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "model.kv_channels=8",
    "trainer.seq_length=32", "trainer.micro_batch_size=1", "trainer.global_batch_size=2", "launch.device=cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def bench(*arguments: str) -> int:
    return cli.main(["bench", *TINY, *arguments])


def rows_of(path: Path) -> dict[str, dict]:
    return {row["scheme"]: row for row in json.loads(path.read_text())["rows"]}


def test_schemes_are_measured_side_by_side(tmp_path: Path, capsys):
    file = tmp_path / "bench.json"
    given = ["--world", "2", "--repeats", "2", "--json", str(file), "--plot", str(tmp_path)]
    specs = ["--schemes", "tsp", "fsdp", "tsp:tsp=3", "trainer.seed=7"]  # an override may follow
    assert bench(*specs, *given, "--sweep", "seq_length=32") == 0
    printed = capsys.readouterr()
    assert "[1/6] tsp, trainer.seq_length=32, 2 ranks, repeat 1: " in printed.err  # a line each, no bar
    assert "ratio to tsp" in printed.out and "peak MB" in printed.out and "LOSS" not in printed.out
    result = json.loads(file.read_text())
    assert result["command"][:2] == ["megatsp", "bench"] and result["machine"]["torch"] == torch.__version__
    tsp, fsdp, refused = result["rows"]
    assert "tsp=3" in refused["refused"] and not refused["speeds"]
    for row in (tsp, fsdp):
        assert [*row["speeds"]] == ["0", "1"] and not row["failures"]
        assert row["config"]["trainer"]["seed"] == 7
        assert all(speed["tokens_per_s"] > 0 for speed in row["speeds"].values())
        assert row["memory"]["peak"] > row["memory"]["weights"] > 0 and sum(row["memory"]["moved"].values())
    assert tsp["speeds"]["0"]["loss"] == pytest.approx(fsdp["speeds"]["1"]["loss"], rel=1e-5)
    for name in ("tokens_per_s.png", "peak_memory.png"):
        assert (tmp_path / name).stat().st_size > 1000

    assert cli.main(["bench", "--from", str(file), "--plot", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out == printed.out
    assert (tmp_path / "again" / "peak_memory.png").exists()
    assert cli.main(["bench", "--from", str(file), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize("mode", [["--simulate-memory"], ["--one-rank", "--rank", "1"]])
def test_memory_without_the_other_ranks(capsys, mode):
    assert bench("--schemes", "tsp", "fsdp_cp", "--world", "4", *mode) == 0
    printed = capsys.readouterr()
    assert "peak MB" in printed.out and "tokens/s" not in printed.out and "4 ranks" in printed.out
    assert printed.err.startswith("[1/2] tsp, 4 ranks, memory: peak ")


def killed(config, device):
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(config, device):
    return torch.empty(2**60)


def broken(config, device):
    print("a word before")
    raise RuntimeError("the planted\nerror")


def hanging(config, device):
    hang()


@pytest.fixture
def bad_schemes(monkeypatch):
    for factory in (killed, out_of_memory, broken, hanging):
        monkeypatch.setitem(REFERENCES, factory.__name__, factory)


def test_a_scheme_that_fails_leaves_the_others_rows_whole(tmp_path: Path, capsys, bad_schemes):
    file = tmp_path / "bench.json"
    specs = ["killed", "tsp", "out_of_memory", "broken"]
    assert bench("--schemes", *specs, "--repeats", "3", "--no-memory", "--json", str(file)) == 0
    rows, text = rows_of(file), capsys.readouterr().out
    assert len(rows["tsp"]["speeds"]) == 3 and not rows["tsp"]["failures"]
    reasons = {name: row["failures"][0]["reason"] for name, row in rows.items() if row["failures"]}
    assert reasons["killed"] == "rank 0 was killed (SIGKILL): most likely out of memory"
    assert reasons["out_of_memory"].startswith("out of memory: rank 0: RuntimeError: ")
    assert reasons["broken"] == "rank 0: RuntimeError: the planted error"
    assert "in broken" in rows["broken"]["failures"][0]["detail"]
    assert "a word before" in rows["broken"]["failures"][0]["detail"]
    for name in ("killed", "out_of_memory", "broken"):
        assert len(rows[name]["failures"]) == runner.TRIES and reasons[name] in text


def test_where_nothing_could_be_measured_the_status_says_so(capsys, bad_schemes):
    assert bench("--schemes", "broken", "tsp:tsp=3", "--repeats", "1") == 1
    out = capsys.readouterr().out
    assert "the planted error" in out and "tsp=3" in out


def test_a_measurement_that_hangs_is_given_up(bad_schemes):
    (case,) = make_cases([*TINY], parse_schemes(["hanging"], REFERENCES), [], [1])
    settings = runner.Settings(repeats=1, timeout_s=3, memory="")
    row = make_row(case, settings)
    saved: list[int] = []
    runner.run(runner.plan([row], [case], settings), settings, lambda: saved.append(len(row.failures)))
    assert saved == [1]
    assert row.failures[0].reason == "timed out: ranks [0] of 1 have not returned in 3 s"


def test_repeats_alternate_and_begin_with_another_scheme():
    sweepless = make_cases([*TINY], parse_schemes(["tsp", "fsdp", "tp"]), [], [1, 2])
    settings = runner.Settings(repeats=2)
    rows = [make_row(case, settings) for case in sweepless]
    tasks = [
        (t.case.scheme.label, t.case.world_size, t.repeat) for t in runner.plan(rows, sweepless, settings)
    ]
    order = [(0, ["tsp", "fsdp", "tp"]), (1, ["fsdp", "tp", "tsp"]), (None, ["tsp", "fsdp", "tp"])]
    assert tasks == [(s, world, repeat) for repeat, names in order for world in (1, 2) for s in names]


def belonging(mark: str) -> list[int]:
    """Processes that were started with this mark in their environment, zombies aside."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_interrupted_it_keeps_its_rows_and_leaves_no_process(tmp_path: Path, interruptible, number):
    file = tmp_path / "bench.json"
    arguments = [*TINY, "--schemes", "tsp", "fsdp", "--world", "2", "--repeats", "999", "--json", str(file)]
    job = subprocess.Popen(
        [sys.executable, "-m", "megatsp", "bench", *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # also marks its processes
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: job.poll() is not None or (file.exists() and rows_of(file)["tsp"]["speeds"]), "a row"
        )
        assert job.poll() is None, job.communicate()
        assert len(belonging(str(tmp_path))) > 1
        if number is signal.SIGINT:
            os.killpg(job.pid, number)  # as a terminal does
        else:
            job.send_signal(number)
        out, err = job.communicate(timeout=LIMIT_S)
    finally:
        job.kill()
    assert job.returncode == (-number if number is signal.SIGKILL else 130)
    assert rows_of(file)["tsp"]["speeds"]
    if number is signal.SIGINT:
        assert "ratio to tsp" in out and "interrupted; this is what was measured before" in err
        assert "Traceback" not in err
    wait_until(lambda: not belonging(str(tmp_path)), lambda: f"{belonging(str(tmp_path))} have ended")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes", "tps"], "unknown scheme 'tps'"),
        (["tsp"], "'tsp' is no override group.key=value; schemes follow --schemes"),
        (["--schemes", "trainer.seed=1"], "--schemes: name at least one scheme"),
        (["--world", "0"], "argument --world: '0': give different numbers of ranks"),
        (["--world", "2,2"], "'2,2': give different numbers of ranks, as in 2 or 2,4"),
        (["--world", "2,"], "'2,': give different numbers"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--warmup", "-1"], "--warmup -1: must be at least 0"),
        (["--timeout", "nan"], "--timeout nan: must be at least 1"),
        (["--sweep", "seq_length"], "write KEY=V1,V2"),
        (["--rank", "0"], "--rank goes with --simulate-memory or --one-rank"),
        (["--simulate-memory", "--one-rank"], "--simulate-memory does not go with --one-rank"),
        (["--simulate-memory", "--repeats", "2"], "--simulate-memory does not go with --repeats"),
        (["--one-rank", "--rank", "2", "--world", "2,4"], "--rank 2: must be in [0, 2)"),
        (["--from", "x.json"], "--from does not go with overrides (model.num_layers=1)"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: give a file in a folder that exists"),
        (["--plot", __file__], "give a folder"),
        (["launch.device=cuda"], "torch sees no GPU"),
    ],
)
def test_a_mistake_is_one_message_and_starts_nothing(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(runner, "run_ranks", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("megatsp: error: ") and message in printed.err and printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere.json"], "--from nowhere.json: "),
        (["--from", __file__], "not a result that `megatsp bench --json FILE` wrote"),
        (["--from", __file__, "--world", "2"], "--from does not go with --world"),
        (["--from", __file__, "--json", "other.json"], "--from goes with --json - alone"),
    ],
)
def test_a_file_that_cannot_be_shown(capsys, arguments, message):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
