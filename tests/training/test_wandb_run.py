"""The W&B run of a training: its mode, its id, which rows it is given, and what becomes of a dead server."""

import json
import os
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_files import all_rows, date_back, parsed, rows

from megatsp.schema import Config, LoggingConfig
from megatsp.training.events import Event
from megatsp.training.logs import Reporter
from megatsp.training.samples import append_samples
from megatsp.training.wandb_file import _BLOCK, _FRAGMENT, _WINDOW, last_step, records
from megatsp.training.wandb_run import RUN_ID, stored_id, wandb_mode

CONFIG = replace(Config(), logging=LoggingConfig(wandb="offline"))
ONLINE = replace(Config(), logging=LoggingConfig(wandb="online"))


def begun(*arguments: Any, **options: Any) -> Reporter:
    """A reporter whose W&B run has begun, as after the first step."""
    reporter = Reporter(*arguments, **options)
    try:
        reporter.begin_wandb()
    except ValueError:
        reporter.close()
        raise
    return reporter


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    """W&B's own variables, but those that keep tests offline, are not set."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_MODE"]:
        monkeypatch.delenv(name)


def test_an_unknown_wandb_mode_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "foo")
    with pytest.raises(ValueError, match="WANDB_MODE=foo: use online, offline or disabled"):
        wandb_mode("auto")


NETRC = "machine api.wandb.ai login user password 0123\n"


@pytest.mark.parametrize(
    ("wanted", "environment", "netrc", "mode"),
    [
        ("disabled", {"WANDB_API_KEY": "0"}, NETRC, "disabled"),
        ("offline", {"WANDB_API_KEY": "0"}, "", "offline"),
        ("online", {"WANDB_MODE": "offline"}, "", "online"),
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "0"}, "", "online"),
        ("auto", {"WANDB_API_KEY": "0", "WANDB_MODE": "offline"}, NETRC, "offline"),
        ("auto", {}, NETRC, "online"),
        ("auto", {}, "machine wandb.example.org login user password 0123\n", "offline"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.example.org"}, NETRC, "offline"),
        ("auto", {}, "default login user password 0123\n", "offline"),
        ("auto", {}, "no netrc at all", "offline"),
    ],
)
def test_wandb_mode(tmp_path, monkeypatch, wanted, environment, netrc, mode):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(wanted) == mode


def test_wandb_mode_without_a_netrc(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    assert wandb_mode("auto") == "offline"


class FakeRun:
    """W&B's run as the server knows it: it has the steps below starting_step."""

    def __init__(self, starting_step: int = 0, offline: bool = False, folder: Path = Path()) -> None:
        self.offline, self.starting_step = offline, starting_step
        self.settings = self
        self.wandb_dir = str(folder / "wandb")
        self.finish_timeout = 60.0
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.alerts: list[tuple[str, str, str]] = []
        self.is_finished = self.is_dead = False

    def log(self, row: dict[str, Any], step: int) -> None:
        if self.is_dead:
            raise BrokenPipeError("the service is gone")
        self.rows.append((step, dict(row)))

    def alert(self, title: str, text: str, level: str, wait_duration: float) -> None:
        self.alerts.append((title, text, level))

    def finish(self, exit_code: int) -> None:
        self.is_finished = True


@pytest.fixture
def online(monkeypatch) -> FakeRun:
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    return run


def test_a_server_that_does_not_answer_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    asked: list[str] = []

    def init(mode: str, **options: Any) -> Any:
        asked.append(mode)
        if mode == "online":
            raise errors[len(asked) - 1]
        return FakeRun(offline=True, folder=tmp_path)

    refused = wandb.errors.AuthenticationError("no such key")
    errors = [wandb.errors.CommError("timed out"), None, refused, None, refused]
    monkeypatch.setattr(wandb, "init", init)
    begun(ONLINE, tmp_path, 0, "", active=True).close()
    assert "did not start (timed out): this run is kept offline" in capsys.readouterr().out
    begun(ONLINE, tmp_path, 0, "", active=True).close()
    assert "did not start (no such key): this run is kept offline" in capsys.readouterr().out
    assert asked == ["online", "offline"] * 2
    (tmp_path / "another").mkdir()
    with pytest.raises(ValueError, match="no such key. Mend that"):
        begun(ONLINE, tmp_path / "another", 0, "", active=True)


@pytest.mark.parametrize("iteration", [0, 4])
def test_a_service_that_does_not_start_does_not_end_a_run(tmp_path, monkeypatch, capsys, iteration):
    def init(**options: Any) -> Any:
        raise wandb.Error("the service did not write its port")

    monkeypatch.setattr(wandb, "init", init)
    reporter = begun(CONFIG, tmp_path, iteration, "saved", active=True)
    reporter.log(iteration + 1, {"lm loss": 1.0})
    reporter.close()
    said = "goes on without Weights & Biases, metrics.jsonl has it all: it did not start: the service did not"
    assert capsys.readouterr().out.count(said) == 1 and reporter.wandb_run_id == "saved"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_setting_that_w_and_b_refuses_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_TAGS", "")
    with pytest.raises(ValueError, match="did not start .offline.: WANDB_TAGS: .*Tag at index 0 is empty"):
        begun(CONFIG, tmp_path, 0, "", active=True)
    wandb.teardown()  # it has read the environment
    begun(CONFIG, tmp_path, 3, "saved", active=True).close()
    assert "goes on without Weights & Biases" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    begun(CONFIG, tmp_path, 0, "", active=True).close()
    out = capsys.readouterr().out
    said = f"cannot write to {tmp_path}/file/below: its files of this start are in {tmp_path}/tmp/wandb"
    assert said in out
    monkeypatch.delenv("WANDB_DIR")
    monkeypatch.chdir(tmp_path)
    begun(CONFIG, Path("tmp/../tmp"), 0, "", active=True).close()
    assert "cannot write" not in capsys.readouterr().out


def test_a_refused_server_is_named_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://someone:pass@wandb.ai")
    wandb.teardown()
    with pytest.raises(ValueError, match="WANDB_BASE_URL: .*http://wandb.ai is not a valid") as refused:
        begun(CONFIG, tmp_path, 0, "", active=True).close()
    assert "pass" not in str(refused.value)
    wandb.teardown()


@pytest.mark.parametrize("argument", ["name=a", "name=hidden-0123"])
def test_w_and_b_lists_no_argument_that_holds_a_secret(tmp_path, monkeypatch, argument):
    monkeypatch.setenv("MY_TOKEN", "hidden-0123")
    monkeypatch.setattr(sys, "argv", ["megatsp", "train", argument])
    begun(CONFIG, tmp_path, 0, "", active=True).close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    listed = [list(r.environment.args) for r in parsed(file) if r.WhichOneof("record_type") == "environment"]
    assert (["train", argument] in listed) == (argument == "name=a")
    assert not any(record.environment.git.remote_url for record in parsed(file))
    assert b"hidden-0123" not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_what_an_online_start_gave_is_not_given_offline_again(tmp_path, capsys):
    """`wandb sync` would move it behind the last step."""
    first = begun(CONFIG, tmp_path, 0, "abc", active=True)
    for iteration in (1, 2, 3):
        first.log(iteration, {"lm loss": 1.0})
    first.close()
    folder = date_back(tmp_path, 1)
    online = folder.rename(folder.with_name(folder.name.removeprefix("offline-")))
    assert capsys.readouterr().out == ""
    for iteration in (4, 5):
        again = begun(CONFIG, tmp_path, iteration - 1, "abc", active=True)
        again.log(iteration, {"lm loss": 1.0})
        again.close()
        date_back(tmp_path, iteration)
    assert [step for step, _ in all_rows(tmp_path)] == [4, 5]
    out = capsys.readouterr().out
    assert out.count("steps up to 3 were given to its server before") == 1
    assert f"`wandb sync --include-online {online}`" in out


def test_w_and_b_gets_what_it_lacks_and_nothing_twice(tmp_path, online):
    entries = [{"iteration": i, "lm loss": i / 3} for i in (1, 2, 3, 4, 5, 6)]
    entries.insert(4, {"iteration": 4, "val/lm loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    online.starting_step = 3  # it has 1 and 2
    reporter = begun(ONLINE, tmp_path, 5, "", active=True)
    reporter.log(5, {"val/lm loss": 1.0})
    reporter.log(6, {"lm loss": 0.5})
    reporter.close()
    four = {"iteration": 4, "lm loss": 4 / 3, "val/lm loss": 2.0}
    five = {"iteration": 5, "lm loss": 5 / 3, "val/lm loss": 1.0}
    assert online.rows == [
        (3, {"iteration": 3, "lm loss": 1.0}), (4, four), (5, five), (6, {"iteration": 6, "lm loss": 0.5}),
    ]  # fmt: skip
    assert online.is_finished


def test_samples_are_filled_in_too_and_are_text(tmp_path, online):
    entries = [{"iteration": i, "lm loss": i / 3} for i in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for iteration in (3, 4, 5):  # at 3 nothing was logged; 5 is after the checkpoint
        append_samples(tmp_path, iteration, [{"prompt": "<b", "continuation": "<script>"}])
    reporter = begun(ONLINE, tmp_path, 4, "", active=True)
    assert reporter.sampled_at == 4
    reporter.close()
    assert [(step, row.keys() - {"iteration"}) for step, row in online.rows] == [
        (2, {"lm loss"}), (3, {"samples"}), (4, {"lm loss", "samples"}),
    ]  # fmt: skip
    assert "<b>&lt;b</b>&lt;script&gt;" in online.rows[1][1]["samples"].html


def test_a_run_that_w_and_b_knows_further_than_its_checkpoint_adds_only_what_is_new(tmp_path, online):
    online.starting_step = 8
    reporter = begun(ONLINE, tmp_path, 4, "", active=True)
    for iteration in range(5, 11):
        reporter.log(iteration, {"lm loss": 1.0})
    reporter.close()
    assert [step for step, _ in online.rows] == [8, 9, 10]


def test_the_row_of_an_iteration_that_is_not_done_is_left_to_the_next_start(tmp_path, online):
    reporter = begun(ONLINE, tmp_path, 0, "", active=True)
    for iteration in (1, 2):
        reporter.log(iteration, {"lm loss": 1.0})
    reporter.close(row_is_open=True)
    assert [step for step, _ in online.rows] == [1] and online.is_finished


def test_of_steps_that_a_rollback_makes_again_the_first_stay(tmp_path, online):
    reporter = begun(ONLINE, tmp_path, 0, "", active=True)
    for iteration in (1, 2, 3, 4):
        reporter.log(iteration, {"lm loss": 1.0})
    reporter.go_back(1)
    for iteration in (2, 3, 4, 5):
        reporter.log(iteration, {"lm loss": 2.0})
    reporter.close()
    assert [(step, row["lm loss"]) for step, row in online.rows] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]


def test_training_goes_on_where_the_service_dies(tmp_path, online, capsys):
    reporter = begun(ONLINE, tmp_path, 0, "", active=True)
    online.is_dead = True
    for iteration in (1, 2, 3):
        reporter.log(iteration, {"lm loss": 1.0})
    reporter.event(Event("finished", 3, "all made", "INFO"))
    reporter.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().out.count("W&B failed (the service is gone)") == 1


def test_alerts_are_sent_and_can_be_turned_off(tmp_path, online):
    for alerts in (True, False):
        config = replace(ONLINE, logging=replace(ONLINE.logging, alerts=alerts))
        reporter = begun(config, tmp_path, 0, "", active=True)
        reporter.event(Event("spike", 3, "a leap", "WARN"))
        reporter.event(Event("saved", 3, "a folder"))
        reporter.close()
    assert online.alerts == [("spike: run", "a leap", "WARN")]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["spike", "saved"] * 2


def test_alerts_of_a_long_name_differ_and_fit(tmp_path, online):
    reporter = begun(replace(ONLINE, name="n" * 100), tmp_path, 0, "", active=True)
    for kind in ("hang", "finished"):
        reporter.event(Event(kind, 3, "t" * 5000, "ERROR"))
    reporter.close()
    titles = [title for title, _, _ in online.alerts]
    assert [title[:9] for title in titles] == ["hang: nnn", "finished:"]
    assert all(len(title) < 64 and len(text) <= 500 for title, text, _ in online.alerts)


def test_environment_variables_win_over_the_configuration(tmp_path, monkeypatch):
    given = {
        "WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g",
        "WANDB_TAGS": "t,u", "WANDB_RUN_ID": "mine", "WANDB_DIR": str(tmp_path / "else"),
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "else").mkdir()
    reporter = begun(CONFIG, tmp_path, 0, "", active=True, about={"mesh": {"world_size": 1}})
    reporter.log(1, {"lm loss": 1.0})
    reporter.close()
    (file,) = (tmp_path / "else" / "wandb").glob("offline-run-*-mine/run-mine.wandb")
    (run,) = [record.run for record in parsed(file) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.entity, run.display_name, run.run_group) == ("p", "e", "n", "g")
    assert (list(run.tags), run.run_id, run.resume) == (["t", "u"], "mine", True)
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["mesh"] == {"world_size": 1} and config["trainer"]["seq_length"] == 256
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name)
    begun(CONFIG, tmp_path, 0, "", active=True).close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*-mine/run-mine.wandb")
    (run,) = [record.run for record in parsed(file) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("megatsp", "run")


def test_a_run_keeps_its_id_whatever_the_environment_says(tmp_path, monkeypatch, online, capsys):
    begun(ONLINE, tmp_path, 0, "", active=True).close()
    first = stored_id(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    again = begun(ONLINE, tmp_path, 0, "", active=True)
    assert (again.wandb_run_id, again.close()) == (first, None)
    assert f"WANDB_RUN_ID=another is not read: this run began as {first}" in capsys.readouterr().out
    of_checkpoint = begun(ONLINE, tmp_path, 0, "saved", active=True)
    assert (of_checkpoint.wandb_run_id, of_checkpoint.close()) == ("saved", None)
    assert (tmp_path / RUN_ID).read_text() == "saved\n"


def test_a_file_is_read_as_far_as_it_is_whole(tmp_path):
    reporter = begun(CONFIG, tmp_path, 0, "whole", active=True)
    for iteration in range(1, 400):
        reporter.log(iteration, {f"metric {n}": "x" * 400 for n in range(20)})
    reporter.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-whole.wandb")
    whole = file.read_bytes()
    assert len(whole) > _WINDOW + _BLOCK and [step for step, _ in rows(file)] == list(range(1, 400))
    assert last_step(file) == 399
    file.write_bytes(whole[: len(whole) // 3])
    torn = [step for step, _ in rows(file)]
    assert 50 < len(torn) < 200 and last_step(file) == torn[-1]
    damaged = bytearray(whole[: 2 * _BLOCK])
    damaged[_BLOCK + 100] ^= 1
    assert 0 < len(list(records(bytes(damaged)))) < len(list(records(whole[: 2 * _BLOCK])))
    no_record = b"\xff" * 4
    fragment = _FRAGMENT.pack(zlib.crc32(no_record, zlib.crc32(b"\x01")), len(no_record), 1) + no_record
    for content in (b"", whole[:7], b"not a log", whole[:7] + fragment):
        file.write_bytes(content)
        assert last_step(file) == -1
