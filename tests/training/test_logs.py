"""What a run reports: metrics.jsonl, the console's lines, Weights & Biases."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatsp.schema import Config, LoggingConfig
from megatsp.training import logs
from megatsp.training.logs import Reporter, evaluation_line, iteration_line, read_metrics

CONFIG = replace(Config(), logging=LoggingConfig(wandb="disabled"))


def write(path: Path, *iterations: int, tail: str = "") -> None:
    path.write_text("".join(json.dumps({"iteration": i, "lm loss": i / 3}) + "\n" for i in iterations) + tail)


@pytest.mark.parametrize("tail", ["", '{"iteration": 7, "lm lo', '{"iteration": 6, "lm loss": 9}'])
def test_resuming_drops_what_came_after_the_checkpoint(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 4, 4, 5, tail=tail)
    reporter = Reporter(CONFIG, tmp_path, 4, "", active=True)
    reporter.log(5, {"lm loss": 0.5, "mfu": None})
    text = path.read_text()  # before close(): a line is on disk as soon as it is logged
    reporter.close()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == [
        *({"iteration": i, "lm loss": i / 3} for i in (1, 2, 4, 4)),
        {"iteration": 5, "lm loss": 0.5, "mfu": None},
    ]


def test_a_new_run_begins_empty_and_other_ranks_write_nothing(tmp_path, capsys):
    silent = Reporter(CONFIG, tmp_path, 0, "", active=False)
    silent.log(1, {"lm loss": 1.0})
    silent.say("nothing")
    silent.advance()
    silent.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
    reporter = Reporter(CONFIG, tmp_path, 0, "", active=True)
    reporter.say("a line")
    reporter.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "" and capsys.readouterr().out == "a line\n"


def test_a_cut_off_last_line_is_left_out(tmp_path):
    write(tmp_path / "metrics.jsonl", 1, 2, tail='{"iteration": 3, "lm')
    assert [entry["iteration"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("line", ["{torn", "null", "[]", "{}"])
def test_another_line_that_is_no_entry_is_refused_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    write(path, 1)
    path.write_text(line + "\n" + path.read_text())
    before = path.read_text()
    with pytest.raises(ValueError, match="line 1, is no entry of metrics"):
        Reporter(CONFIG, tmp_path, 1, "", active=True)
    assert path.read_text() == before


def test_console_lines():
    metrics = {
        "consumed-samples": 160, "iteration-time-ms": 12.34, "tokens/s/gpu": 1234.5, "tflops/gpu": 0.25,
        "learning-rate": 3e-4, "lm loss": 2.5, "grad-norm": 0.75,
    }  # fmt: skip
    assert iteration_line(10, 100, 16, metrics) == (
        " iteration       10/     100 | consumed samples:          160 | elapsed time per iteration (ms): "
        "12.3 | tokens/s/gpu: 1234 | throughput per GPU (TFLOP/s/GPU): 0.250 | learning rate: 3.000000E-04"
        " | global batch size:    16 | lm loss: 2.500000E+00 | grad norm: 0.750 |"
    )
    assert evaluation_line(10, "val", {"val/lm loss": 2.5, "val/bits-per-byte": 3.6067}) == (
        " validation loss at iteration 10 | lm loss: 2.500000E+00 | bits per byte: 3.6067"
    )
    assert (
        evaluation_line(9, "test", {"test/lm loss": 2.5})
        == " test loss at iteration 9 | lm loss: 2.500000E+00"
    )
    assert "no token of its samples is trained" in evaluation_line(10, "val", {})


def test_a_full_disk_loses_no_line_and_stops_nothing(tmp_path, capsys):
    reporter = Reporter(CONFIG, tmp_path, 0, "", active=True)
    file = reporter._file
    with Path("/dev/full").open("ab", buffering=0) as full:
        reporter._file = full  # type: ignore[assignment]
        reporter.log(1, {"lm loss": 3.0})
        reporter.log(2, {"lm loss": 2.0})
    reporter._file = file
    reporter.log(3, {"lm loss": 1.0})
    reporter.close()
    assert [entry["iteration"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written: No space left on device") == 1


def test_a_full_disk_stops_no_return_to_an_earlier_iteration(tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4)
    before = path.read_text().splitlines(True)
    reporter = Reporter(CONFIG, tmp_path, 4, "", active=True)
    monkeypatch.setattr(logs, "replace_text", full)
    reporter.go_back(2)
    reporter.close()
    assert path.read_text() == "".join(before[:2])


def test_a_line_that_is_half_written_is_written_again(tmp_path):
    reporter = Reporter(CONFIG, tmp_path, 0, "", active=True)
    reporter.log(1, {"lm loss": 3.0})
    file = reporter._file
    reporter._file = HalfFull(file)  # type: ignore[assignment]
    reporter.log(2, {"lm loss": 2.0})
    assert [entry["iteration"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    reporter._file = file
    reporter.log(3, {"lm loss": 1.0})
    reporter.close()
    assert [entry["iteration"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


class HalfFull:
    """A file on a disk with room for five more bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.truncate = file.seek, file.truncate

    def write(self, content: bytes) -> int:
        written: int = self._file.write(content[:5])
        return written
