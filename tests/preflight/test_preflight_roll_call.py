"""Ranks of a roll call as processes: what they are told, what is written, and how strangers fare."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import RANK_VARIABLES
from waiting import LIMIT_S, free_port, wait_until

from megatsp.cluster.mesh import coordinates
from megatsp.preflight import facts as facts_module
from megatsp.preflight.decide import Answer
from megatsp.preflight.facts import facts
from megatsp.preflight.files import write_report
from megatsp.preflight.host import Host, Token, listen
from megatsp.preflight.roll_call import check_mesh, find_task, main, read_mesh

MESH = "dp_replicate=1,dp_shard=2,cp=1,tsp=4,tp=1"
SIZES = read_mesh(MESH)


# Rank 0's time is up once so many others have answered, and not before.
TIME_IS_UP = """
import sys, time
from megatsp.preflight import roll_call
from megatsp.preflight.host import Host
collect, few = Host.collect, {few}
def until_few(host, deadline):
    assert deadline - time.monotonic() < roll_call._parse(sys.argv[1:]).timeout
    while len(found := collect(host, time.monotonic() + 0.1)) < few:
        pass
    return found
Host.collect = until_few
sys.exit(roll_call.main(sys.argv[1:]))
"""


def call_roll(
    folder: Path,
    ranks: Sequence[int],
    num_nodes: int,
    *options: str,
    folders: dict[int, Path] | None = None,
    few: int = 0,
) -> tuple[dict[int, int], dict[int, str], dict[int, str]]:
    """Starts these ranks of `num_nodes` nodes of four; two nodes are needed.

    folders: what some ranks take for the folder. few: answers after which rank 0 waits for no more.
    Returns exit statuses, outputs and errors by rank.
    """
    address = f"localhost:{free_port()}"
    processes: dict[int, subprocess.Popen[str]] = {}
    try:
        for rank in ranks:
            environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
            environment |= {
                "SLURM_JOB_ID": "17", "SLURM_NTASKS": str(4 * num_nodes), "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % 4), "SLURMD_NODENAME": f"n{rank // 4}",
                "SLURM_STEP_NODELIST": f"n[0-{num_nodes - 1}]",
            }  # fmt: skip
            own = (folders or {}).get(rank, folder)
            program = ["-m", "megatsp.preflight.roll_call"]
            if few and rank == 0:
                program = ["-c", TIME_IS_UP.format(few=few)]
            processes[rank] = subprocess.Popen(
                [sys.executable, *program, "--address", address, "--nodes", "2",
                 "--ranks-per-node", "4", "--mesh", MESH, "--folder", str(own), *options],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        said = {rank: process.communicate(timeout=LIMIT_S) for rank, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    statuses = {rank: process.returncode for rank, process in processes.items()}
    outputs, errors = ({rank: pair[i] for rank, pair in said.items()} for i in (0, 1))
    return statuses, outputs, errors


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_are_well(tmp_path):
    statuses, outputs, errors = call_roll(tmp_path, range(8), 2)
    assert set(statuses.values()) == {0}, errors
    assert files(tmp_path) == ["nodes.txt", "present.txt", "roll_call.json"]  # the token is gone
    assert (tmp_path / "nodes.txt").read_text() == "n0\nn1\n"
    report = json.loads((tmp_path / "roll_call.json").read_text())
    assert report["enough"] and [rank["task"] for rank in report["ranks"]] == list(range(8))
    for rank in report["ranks"]:
        assert rank["rank"] == rank["task"]
        assert rank["coordinates"] == coordinates(rank["rank"], list(SIZES.values()))
    assert {node["versions"]["python"] for node in report["nodes"]} == {sys.version.split()[0]}
    assert "8 of 8 ranks of 2 nodes answered" in outputs[0] and "runs on 2 nodes: n0, n1" in outputs[0]
    assert not any(outputs[rank] for rank in range(1, 8))


def test_a_spare_takes_the_place_of_a_node_that_does_not_see_the_folder(tmp_path):
    folder, other = tmp_path / "shared", tmp_path / "other"
    other.mkdir()
    statuses, outputs, errors = call_roll(folder, range(12), 3, folders={2: other})
    assert set(statuses.values()) == {0}, errors
    assert (folder / "nodes.txt").read_text() == "n1\nn2\n" == (folder / "present.txt").read_text()
    assert "n0 is left out: local rank 2 cannot read" in outputs[0]
    assert "n2 takes the place of n0" in outputs[0]
    report = json.loads((folder / "roll_call.json").read_text())
    assert [rank["rank"] for rank in report["ranks"]] == [-1] * 4 + list(range(8))
    assert [node["replaced_by"] for node in report["nodes"]] == ["n2", "", ""]
    assert files(other) == []


def test_a_spare_that_is_not_needed(tmp_path):
    statuses, _, errors = call_roll(tmp_path, range(12), 3)
    assert set(statuses.values()) == {0}, errors
    assert (tmp_path / "nodes.txt").read_text() == "n0\nn1\n"
    assert (tmp_path / "present.txt").read_text() == "n0\nn1\nn2\n"


def test_a_node_that_is_missing(tmp_path):
    statuses, _, errors = call_roll(tmp_path, [0, 1, 2, 3, 4], 2, few=4)
    assert set(statuses.values()) == {77}
    assert "2 nodes are needed, but only 1 of the 2" in errors[0]
    assert "n1: no answer from ranks 5, 6, 7" in errors[0] and "launch.spare_nodes" in errors[0]
    assert not any(errors[rank] for rank in range(1, 5))  # rank 0 says it
    assert files(tmp_path) == ["roll_call.json"]
    assert not json.loads((tmp_path / "roll_call.json").read_text())["enough"]


def test_a_rank_that_comes_too_late(tmp_path, monkeypatch):
    """Its node is left out, and it is no reason for the job to end."""
    port = free_port()
    late = {"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "SLURMD_NODENAME": "n1"}

    def come_late(enough: bool) -> int:
        given = ["--address", f"localhost:{port}", "--nodes", "1", "--ranks-per-node", "4", "--folder"]
        given += [str(tmp_path), "--mesh", MESH.replace("dp_shard=2", "dp_shard=1")]

        def call(*address: object, **options: object) -> None:
            write_report(tmp_path / "roll_call.json", {"enough": enough})  # rank 0, which then is gone
            raise ConnectionRefusedError

        monkeypatch.setattr(socket, "create_connection", call)
        return main(given, late)

    assert come_late(True) == 0
    assert come_late(False) == 77  # the report of before is another file


def test_gpus_that_are_not_there(tmp_path):
    if facts()["gpus"] >= 4:
        pytest.skip("this machine has four GPUs")
    statuses, _, errors = call_roll(tmp_path, range(8), 2, "--devices")
    assert set(statuses.values()) == {77} and "GPUs for 4 ranks" in errors[0]


def test_rank_0_cannot_be_reached(tmp_path):
    statuses, _, errors = call_roll(tmp_path, [4, 5], 2, "--timeout", "1")
    assert set(statuses.values()) == {77}
    assert "rank 4 on n1 has not reached rank 0 at localhost:" in errors[4] and "firewall" in errors[4]
    assert errors[5] == ""  # one rank of a node says it


def test_nothing_heavy_is_imported():
    code = (
        "import sys; before = set(sys.modules)\n"
        "import megatsp.preflight.roll_call, megatsp.preflight.facts, megatsp.preflight.host\n"
        "import megatsp.preflight.decide, megatsp.preflight.node_names, megatsp.preflight.files\n"
        "names = {n.partition('.')[0] for n in set(sys.modules) - before} - {'megatsp'}\n"
        "print(sorted(names - sys.stdlib_module_names))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def answer_line(**changes) -> bytes:
    said = {
        "rank": 1, "node": "n0", "local_rank": 1, "boot_id": "b", "facts": {}, "job": "17", "token": "",
        "clock": 0.0, **changes,
    }  # fmt: skip
    return json.dumps(said).encode() + b"\n"


def heard(host: Host, guest: socket.socket) -> list[Answer]:
    """The answers once the host has counted what this guest said, or hung up on it."""
    found: list[Answer] = []

    def is_done() -> bool:
        nonlocal found
        found = host.collect(time.monotonic() + 0.05)
        counted = any(other.getpeername()[1] == guest.getsockname()[1] for _, other in host._answers.values())
        return counted or is_hung_up_on(guest)

    wait_until(is_done, "the host has heard the guest")
    return found


def is_hung_up_on(guest: socket.socket) -> bool:
    """Whether the connection has ended; the host's only line before may be unread."""
    guest.setblocking(False)
    try:
        while guest.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return True


def hear(folder: Path, *texts: bytes | dict) -> list[tuple[int, bool]]:
    """What a host of two ranks and job 17 makes of several callers: (rank, whether it sees the folder).

    A dict: an answer with the token and these changes.
    """
    port = free_port()
    guests = []
    with Token(folder) as token, Host(listen(port, 2), token, "17", 2) as host:
        try:
            for text in texts:
                guests.append(socket.create_connection(("localhost", port)))
                guests[-1].sendall(
                    text if isinstance(text, bytes) else answer_line(token=token.value, **text)
                )
                found = heard(host, guests[-1])
        finally:
            for guest in guests:
                guest.close()
    return [(answer.rank, answer.sees_folder) for answer in found]


@pytest.mark.parametrize(
    "text",
    [
        b"GET / HTTP/1.1\r\n\r\n", b"x" * 20000 + b"\n", b"[1]\n", b"{}\n", b"[" * 9000 + b"\n",
        answer_line(token="0" * 48), answer_line(token="é"), answer_line(job="16"),
        answer_line(rank="0"), answer_line(rank=2), answer_line(rank=-1), answer_line(rank="one"),
    ],
)  # fmt: skip
def test_strangers_are_hung_up_on(tmp_path, text):
    assert hear(tmp_path, text) == []
    assert hear(tmp_path, text, {}) == [(1, True)]


def test_a_rank_of_this_job_that_does_not_see_the_folder(tmp_path):
    assert hear(tmp_path, answer_line()) == [(1, False)]


def test_who_has_read_the_token_is_not_replaced_by_one_who_has_not(tmp_path):
    port = free_port()
    with Token(tmp_path) as token, Host(listen(port, 3), token, "17", 3) as host:  # so it goes on listening
        with (
            socket.create_connection(("localhost", port)) as one,
            socket.create_connection(("localhost", port)) as other,
            socket.create_connection(("localhost", port)) as third,
        ):
            one.sendall(answer_line())
            assert [a.sees_folder for a in heard(host, one)] == [False]
            other.sendall(answer_line(token=token.value))
            assert [a.sees_folder for a in heard(host, other)] == [True]
            third.sendall(answer_line())
            assert [a.sees_folder for a in heard(host, third)] == [True]
        wait_until(lambda: host.collect(time.monotonic() + 0.05) == [], "it has gone")


def test_a_stranger_at_the_address_gets_no_file(tmp_path):
    """Who poses as rank 0 names a file, which is not read to it."""
    secret = tmp_path / "secret"
    secret.write_text("of nobody's concern")
    from megatsp.preflight.guest import _token

    assert _token(tmp_path, "secret") == _token(tmp_path, "../" + secret.name) == ""
    with Token(tmp_path) as token:
        assert _token(tmp_path, token.path.name) == token.value
        assert token.path.stat().st_mode & 0o077 == 0


def test_a_mesh_with_groups_across_nodes():
    check_mesh(SIZES, 2, 4)
    with pytest.raises(ValueError, match=r"has 8 ranks, but 3 nodes of 4 have 12"):
        check_mesh(SIZES, 3, 4)
    with pytest.raises(ValueError, match=r"parallel.tsp=4: .* ranks 0 to 3, would lie on nodes 0 to 1"):
        check_mesh(SIZES, 4, 2)
    with pytest.raises(ValueError, match=r"ranks 4 to 7, would lie on nodes 0 to 1 "):
        check_mesh(read_mesh("dp_replicate=1,dp_shard=3,cp=1,tsp=4,tp=1"), 2, 6)
    with pytest.raises(ValueError, match=r"parallel.tp=2: "):
        check_mesh(read_mesh("dp_replicate=1,dp_shard=3,cp=1,tsp=1,tp=2"), 2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tsp=4", "lacks dp_replicate"),
        (MESH.replace("tsp", "tps"), "unknown axis 'tps'; did you mean"),
        (MESH.replace("tsp=4", "tsp=0"), "'tsp=0': give a number of ranks"),
    ],
)
def test_meshes_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        read_mesh(text)


def test_mistakes(tmp_path, capsys):
    def run(*arguments: str, world: int = 8) -> str:
        environment = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
        assert main(arguments, environment) == 2
        return capsys.readouterr().err

    given = ("--nodes", "2", "--ranks-per-node", "4", "--mesh", MESH, "--folder")
    assert "give HOST:PORT" in run("--address", "n1", *given, str(tmp_path))
    assert "9 tasks: start 4 on each" in run("--address", "n1:1", *given, str(tmp_path), world=9)
    (tmp_path / "file").write_text("")
    message = run("--address", f"n1:{free_port()}", *given, str(tmp_path / "file" / "below"))
    assert "give one that all nodes can write to" in message
    with socket.create_server(("", 0)) as taken:
        message = run("--address", f"n1:{taken.getsockname()[1]}", *given, str(tmp_path))
    assert "cannot listen at port" in message and "launch.slurm.port" in message
    assert "--nodes 0: must be positive" in run("--address", "n1:1", *given, str(tmp_path), "--nodes", "0")
    assert main([], {}) == 2 and "start one task a rank by srun" in capsys.readouterr().err


def test_who_a_task_is():
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "n1"}
    task = find_task(slurm)
    assert (task.rank, task.world, task.local_rank, task.node, task.job) == (5, 8, 1, "n1", "")
    task = find_task({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", **slurm})
    assert (task.rank, task.world, task.local_rank) == (2, 4, 2)
    del slurm["SLURMD_NODENAME"]
    assert find_task(slurm).node == socket.gethostname()


def test_facts_of_amd_gpus(tmp_path):
    for number, gib in ((10, 64), (9, 192), (1, 192)):
        file = tmp_path / f"sys/class/drm/card{number}/device/mem_info_vram_total"
        file.parent.mkdir(parents=True)
        file.write_text(f"{gib << 30}\n")
    (tmp_path / "opt/rocm/.info").mkdir(parents=True)
    (tmp_path / "opt/rocm/.info/version").write_text("6.4.1-83\n")
    found = facts(tmp_path)
    assert found["gpus"] == 3 and found["gpu_bytes"] == [192 << 30, 192 << 30, 64 << 30]
    assert found["versions"]["ROCm"] == "6.4.1-83" and found["versions"]["torch"]
    assert facts(tmp_path / "none")["gpus"] == 0


@pytest.mark.parametrize(
    ("script", "gpu_bytes", "error"),
    [
        ("echo 143771; echo 143771", [143771 << 20] * 2, ""),
        ("echo Unable to determine the device handle; exit 15", [], "nvidia-smi: Unable to determine"),
        ("echo 81559; echo '[GPU is lost]'", [], "nvidia-smi: 81559 [GPU is lost]"),
        ("sleep 3600", [], "has not answered in"),
    ],
)
def test_facts_of_nvidia_gpus(tmp_path, monkeypatch, script, gpu_bytes, error):
    for number in range(2):
        (tmp_path / f"proc/driver/nvidia/gpus/0000:0{number}:00.0").mkdir(parents=True)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexec 2>&1\n{script}\n".replace("sleep", "exec sleep"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(facts_module, "_TIMEOUT_S", 1 if script.startswith("sleep") else LIMIT_S)
    found = facts(tmp_path)
    assert found["gpus"] == 2 and found["gpu_bytes"] == gpu_bytes
    assert error in found["gpu_error"] and bool(error) == bool(found["gpu_error"])
