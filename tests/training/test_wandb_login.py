"""A dead key is found before a job is submitted; a server that does not answer is no error."""

import base64
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from wandb.sdk.lib.wbauth.wbnetrc import read_netrc_auth

from megatsp.schema import Config, LoggingConfig
from megatsp.training import wandb_login
from megatsp.training.wandb_login import check_login
from megatsp.training.wandb_run import wandb_mode
from megatsp.training.wandb_server import api_key, login_page, server_url

KEY = "0123456789abcdef" * 3
AUTO, ONLINE = (replace(Config(), logging=LoggingConfig(wandb=wanted)) for wanted in ("auto", "online"))


class Server(ThreadingHTTPServer):
    """Answers as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.content = 200, b""
        self.is_silent = threading.Event()
        self.is_closing = threading.Event()
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked.append(self.headers["Authorization"])
        if self.server.is_silent.is_set():
            self.server.is_closing.wait(60)
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        self.send_header("Location", "http://127.0.0.1:1/graphql")
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb_login, "_PATIENCE_S", 5.0)
    try:
        yield server
    finally:
        server.is_closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def viewer(user: dict[str, str] | None) -> bytes:
    return json.dumps({"data": {"viewer": user}}).encode()


def test_a_key_that_the_server_knows(server):
    server.content = viewer({"username": "someone"})
    assert check_login(AUTO) == "" == check_login(ONLINE)
    assert server.asked == ["Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()] * 2


@pytest.mark.parametrize(("status", "content"), [(401, b"{}"), (403, b""), (200, viewer(None))])
def test_a_key_that_the_server_refuses(server, status, content):
    server.status, server.content = status, content
    with pytest.raises(ValueError, match="refuses the W&B key: get one at .*/authorize") as refused:
        check_login(AUTO)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("status", "content", "why"),
    [(503, b"", "HTTP status 503"), (200, b"<html>", "no answer of W&B's"), (307, b"", "HTTP status 307")],
)
def test_a_server_that_cannot_tell(server, status, content, why):
    server.status, server.content = status, content
    said = check_login(ONLINE)
    assert "could not be asked about the key" in said and why in said and KEY not in said


def test_a_server_that_does_not_answer(server, monkeypatch):
    monkeypatch.setattr(wandb_login, "_PATIENCE_S", 0.2)
    server.is_silent.set()
    said = check_login(AUTO)
    assert "could not be asked about the key" in said and KEY not in said
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert "could not be asked about the key" in check_login(AUTO)


@pytest.mark.parametrize("key", ["short", KEY[:39], KEY + " ", KEY + "\n"])
def test_what_cannot_be_a_key_is_refused_without_asking(server, monkeypatch, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(ValueError, match="cannot be one: it has") as refused:
        check_login(AUTO)
    assert key.strip() not in str(refused.value) and server.asked == []


def test_without_a_key_or_a_use_for_it(server, monkeypatch, tmp_path):
    assert check_login(replace(Config(), logging=LoggingConfig(wandb="offline"))) == ""
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    said = check_login(AUTO)
    assert said.startswith("Weights & Biases: no key for http://127") and "so the run is kept offline" in said
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check_login(AUTO) == ""  # as was asked for
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ValueError, match="logging.wandb=online, but there is no key for http://127"):
        check_login(ONLINE)
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    with pytest.raises(ValueError, match="there is no key for http://127"):
        check_login(ONLINE)  # of another port: W&B does not use it either
    host = f"127.0.0.1:{server.server_port}"
    (tmp_path / "netrc").write_text(f"machine {host} login user password {KEY}\n")
    server.content = viewer({"username": "someone"})
    assert check_login(ONLINE) == "" and len(server.asked) == 1
    assert server.asked[0].startswith("Basic ")


def test_the_server_is_that_of_w_and_bs_settings(server, monkeypatch, tmp_path):
    """A key of one's own server is not sent to api.wandb.ai."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    url = os.environ["WANDB_BASE_URL"]
    monkeypatch.delenv("WANDB_BASE_URL")
    assert server_url() == wandb.Settings().base_url
    for folder, base_url in (("config", "http://127.0.0.1:1"), ("wandb", url)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "settings").write_text(f"[default]\nbase_url = {base_url}\n")
        assert server_url() == base_url.rstrip("/")
    wandb.teardown()
    assert wandb.setup().settings.base_url == server_url()
    wandb.teardown()
    server.content = viewer({"username": "someone"})
    assert check_login(AUTO) == "" and len(server.asked) == 1
    (tmp_path / "wandb" / "settings").write_text("no settings")
    assert server_url() == "http://127.0.0.1:1"


@pytest.fixture
def home(monkeypatch, tmp_path) -> Iterator[Path]:
    """An empty home and folder, and nothing of W&B's in the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


def test_the_default_server_is_wandbs_own(home, monkeypatch):
    """Not one of ours, which a later wandb leaves behind."""
    assert server_url() == wandb.Settings().base_url == wandb.setup().settings.base_url
    # Addresses that wandb changes, leaves alone, and refuses.
    for given in ("https://forge.coreweave.com/api/wandb", "https://api.wandb.ai/", "https://w.example.org"):
        monkeypatch.setenv("WANDB_BASE_URL", given)
        wandb.teardown()
        assert server_url() == wandb.setup().settings.base_url
    monkeypatch.setenv("WANDB_BASE_URL", "no address/")
    assert server_url() == "no address" and login_page(server_url()) == "no address/authorize"


def test_the_key_of_a_login_is_found(home):
    assert api_key(server_url()) == "" and wandb_mode("auto") == "offline"
    wandb.login(key=KEY, relogin=True, verify=False)
    assert (home / ".netrc").is_file()
    assert api_key(server_url()) == KEY and wandb_mode("auto") == "online"
    (home / ".netrc").chmod(0o644)  # as wandb, and unlike netrc() of Python
    assert api_key(server_url()) == KEY


@pytest.mark.parametrize("server", [None, "https://api.wandb.ai", "https://w.example.org"])
@pytest.mark.parametrize(
    "machines", ["api.wandb.ai", "api.forge.coreweave.com api.wandb.ai", "other.example.org"]
)
def test_the_key_is_the_one_that_wandb_takes(home, server, machines):
    """That of an older login too: wandb.ai was the default server."""
    server = server or server_url()
    entries = [f"machine {name} login user password {KEY}{i}\n" for i, name in enumerate(machines.split())]
    (home / ".netrc").write_text("".join(entries))
    assert api_key(server) == (read_netrc_auth(host=server) or "")


def test_a_servers_user_and_password_are_not_shown(server, monkeypatch, capfd):
    address = f"http://someone:pass@word@127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    server.status = 503
    said = check_login(ONLINE)
    assert "HTTP status 503" in said and f"//127.0.0.1:{server.server_port} " in said
    server.status = 401
    with pytest.raises(ValueError, match="refuses the W&B key") as refused:
        check_login(ONLINE)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ValueError, match="cannot be one") as short:
        check_login(ONLINE)
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(ValueError, match="there is no key") as missing:
        check_login(ONLINE)
    said += check_login(AUTO) + "".join(str(error.value) for error in (refused, short, missing))
    assert "kept offline" in said
    assert not any(hidden in said + "".join(capfd.readouterr()) for hidden in ("someone", "pass", "word@"))
