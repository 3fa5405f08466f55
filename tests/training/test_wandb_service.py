"""W&B's service stalls, dies or loses its server: training and its end go on."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from waiting import LIMIT_S, wait_until
from wandb_files import rows

from megatsp.training.wandb_service import patiently

# A start of 3 rows, in which the service gets a signal; with little patience.
START = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path

from megatsp.schema import Config, LoggingConfig
from megatsp.training import logs, wandb_service

folder, mode, sent, rows = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
config = replace(Config(), logging=LoggingConfig(wandb=mode))
reporter = logs.Reporter(config, folder, 0, "abc", active=True)
reporter.log(1, {"lm loss": 1.0})
reporter.begin_wandb()
if sent:
    from wandb.sdk import wandb_setup
    wandb_setup.singleton()._connection._proc._process.send_signal(getattr(signal, sent))
if sent == "SIGSTOP":  # which answers nothing any more, however long one waits
    logs._PATIENCE_S = wandb_service._END_S = 1.0
for iteration in range(2, rows):
    reporter.log(iteration, {f"metric {n}": 1.0 for n in range(20)})
reporter.close()
"""


def ended(*arguments: str, **variables: str) -> str:
    """What such a start says, given the time to end by itself."""
    environment = {**os.environ, "WANDB_ERROR_REPORTING": "false", "WANDB_FINISH_TIMEOUT": "2", **variables}
    job = subprocess.run(
        [sys.executable, "-c", START, *arguments],
        env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert "Traceback" not in job.stderr
    return job.stdout


@pytest.mark.parametrize(
    ("sent", "rows", "why"),
    [
        ("SIGSTOP", 4, "no answer of its service in 3 s"),  # at the end
        ("SIGSTOP", 20000, "no answer of its service in 1 s"),  # its socket is full
        ("SIGKILL", 2000, ""),
    ],
)
def test_a_service_that_stalls_or_dies_ends_neither_training_nor_its_end(tmp_path, sent, rows, why):
    out = ended(str(tmp_path), "offline", sent, str(rows))
    assert out.count(" W&B failed (") == 1 and why in out
    entries = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(entries) == rows - 1


class Forgetful(BaseHTTPRequestHandler):
    """A W&B server that begins a run, and then takes nothing; or knows no key."""

    status = 200

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers["Content-Length"])).decode()
        entity = {"id": "e", "name": "e"}
        project = {"id": "p", "name": "p", "entity": entity}
        run = {"id": "x", "name": "abc", "displayName": "run", "project": project, "historyLineCount": 0}
        data: dict[str, object] = {}
        if "upsertBucket" in query:
            data = {"upsertBucket": {"bucket": run, "inserted": True}}
        elif "bucket(" in query:
            data = {"model": {"id": "p", "name": "p", "bucket": None}}
        elif "viewer" in query:
            data = {
                "viewer": {"id": "1", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}
            }
        content = json.dumps({"data": data}).encode()
        self.send_response(self.status if data else 503)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(params=[200])
def server(request) -> Iterator[str]:
    handler = type("Handler", (Forgetful,), {"status": request.param})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_takes_no_row_does_not_hold_up_the_end(tmp_path, server):
    out = ended(
        str(tmp_path), "online", "", "40", WANDB_BASE_URL=server, WANDB_API_KEY="0123456789abcdef" * 3
    )
    (kept,) = (tmp_path / "wandb").glob("run-*-abc")
    assert "the server did not take all in 2 s; the next start gives it what it lacks" in out
    assert f"`wandb sync --include-online {kept}`" in out


@pytest.mark.parametrize("server", [401], indirect=True)
def test_a_server_that_does_not_begin_the_run_makes_it_an_offline_one(tmp_path, server):
    out = ended(str(tmp_path), "online", "", "4", WANDB_BASE_URL=server, WANDB_API_KEY="0123456789abcdef" * 3)
    assert out.count("this run is kept offline") == 1 and "W&B failed" not in out
    (file,) = (tmp_path / "wandb").glob("offline-run-*-abc/*.wandb")
    assert [step for step, _ in rows(file)] == [1, 2, 3]


def test_patience_is_with_what_makes_no_progress():
    made: list[int] = []
    looks: list[None] = []

    def work() -> None:
        for step in range(5):
            wait_until(lambda n=step: len(looks) > 2 * n, "somebody looks whether there is progress")
            made.append(step)

    def progress() -> int:
        looks.append(None)
        return len(looks)

    patiently(work, 0.001, progress)
    assert made == [0, 1, 2, 3, 4]
    stop = threading.Event()
    with pytest.raises(TimeoutError, match="no answer"):
        patiently(stop.wait, 0.2)
    stop.set()
    with pytest.raises(KeyError, match="this"):
        patiently(lambda: {}["this"], LIMIT_S)
    with pytest.raises(RuntimeError, match="ended with status 3"):
        patiently(lambda: sys.exit(3), LIMIT_S)
