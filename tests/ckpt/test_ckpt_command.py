"""`megatsp ckpt` on checkpoints of a real run: what it says, what it refuses, what it writes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from runs import files, overrides, start_training, write_corpus

from megatsp import cli
from megatsp.checkpoint import store
from megatsp.checkpoint.manifest import FileEntry, checksum, read_manifest, write_manifest
from megatsp.checkpoint.paths import BEST, LATEST, folder_of
from megatsp.checkpoint.state import RunState
from megatsp.ckpt import diff as ckpt_diff
from megatsp.ckpt.command import run
from megatsp.ckpt.tensors import Box, StoredTensors
from megatsp.cli import main
from megatsp.compose import compose, to_yaml
from megatsp.hf.safetensors_file import TensorFile
from megatsp.schema import Config

# Trained and saved on the first; the others load that and save it again. 45 columns divide by nothing.
MESHES = {
    "shard2-tsp2": ["parallel.dp_shard=2", "parallel.tsp=2"],
    "tsp4": ["parallel.tsp=4"],
    "owner2-replicate2": ["parallel.tsp=2", "parallel.tsp_layout=owner", "parallel.dp_replicate=2"],
    "tp2-cp2": ["parallel.tp=2", "parallel.cp=2"],
    "cp2-over-tsp2": ["parallel.cp=2", "parallel.tsp=2", "parallel.fsdp_over_cp=true"],
}
FIRST = "shard2-tsp2"


def train_and_save(configs: dict[str, Config], folder: Path) -> None:
    """On a rank: two steps on the first mesh, saved after each; then what every other mesh saves of them."""
    start_training(configs[FIRST]).run([])
    for name, config in configs.items():
        training = start_training(config)  # goes on from what the first has saved
        assert training.state.iteration == 2
        tensors = training.optimizer.tensors()
        extra = {"config.yaml": to_yaml(training.config).encode()}
        store.save(folder / name, training.state, training.gpt, tensors, extra, training.tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `run`, and what ranks of each mesh saved of its last checkpoint by the mesh."""
    folder = tmp_path_factory.mktemp("ckpt")
    write_corpus(folder / "corpus")
    more = ["trainer.train_iters=2", "scheduler.lr_warmup_iters=1", "checkpoint.save_interval=1"]
    small = ["trainer.micro_batch_size=1", "model.num_layers=1", "name=run"]
    common = overrides(folder / "corpus", folder, *more, *small)
    configs = {name: compose([*common, *mesh]) for name, mesh in MESHES.items()}
    run_distributed(train_and_save, 4, configs, folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return shutil.copytree(saved / "run", tmp_path / "copy")


def output(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == status
    return capsys.readouterr().out


def last(run_folder: Path) -> Path:
    return folder_of(run_folder / "checkpoints", 2)


def shard_of(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.safetensors"))[0]


@pytest.mark.parametrize("mesh", MESHES)
def test_resharding_writes_what_that_mesh_would(saved, tmp_path, capsys, mesh):
    target = tmp_path / "resharded"
    output(capsys, "reshard", saved / "run", "--output", target, *MESHES[mesh])
    ours, theirs = last(target), folder_of(saved / mesh, 2)
    written, expected = read_manifest(ours), read_manifest(theirs)
    assert written.tensors == expected.tensors and len(written.shards) == 4
    differing = {name for name, entry in expected.files.items() if written.files.get(name) != entry}
    assert differing <= {"config.yaml"}  # its name and folder; every shard is the same, to the byte
    assert written.files.keys() == expected.files.keys()
    assert (target / "checkpoints" / LATEST).read_text() == "2\n"
    assert output(capsys, "diff", saved / "run", target, "--ignore-settings").startswith(
        f"{len(written.tensors)} tensors are equal to the bit"
    )
    if mesh != FIRST:
        text = output(capsys, "diff", saved / "run", target, status=1)
        assert "settings:" in text and "values" not in text and 'name: "run" -> "resharded"' in text
    assert "whole" in output(capsys, "verify", target, "--finite")


def test_an_imported_checkpoint_keeps_its_types(saved, tmp_path, capsys):
    """Of iteration 0 there are weights alone, in the types of where they came from."""
    stored = StoredTensors(last(saved / "run"))
    weights = {
        name: stored.read(name).to(torch.float16 if "norm" in name else torch.bfloat16)
        for name in stored.manifest.tensors
        if not name.startswith("optimizer.")
    }
    extra = {"config.yaml": (stored.folder / "config.yaml").read_bytes(), "hf/config.json": b"{}"}
    store.write(tmp_path / "imported" / "checkpoints", RunState(), weights, extra, None)
    target = tmp_path / "resharded"
    output(capsys, "reshard", tmp_path / "imported", "--output", target, "parallel.tsp=2")
    folder = folder_of(target / "checkpoints", 0)
    found = StoredTensors(folder)
    assert len(found.manifest.shards) == 2 and (folder / "hf" / "config.json").read_bytes() == b"{}"
    assert found.manifest.tensors.keys() == weights.keys()
    assert all(torch.equal(found.read(name), weight) for name, weight in weights.items())
    assert found.read("model.norm.weight").dtype == torch.float16
    assert list(found.pieces("model.norm.weight", Box((16,), (1,)))) == [
        ("shard-00002-of-00002.safetensors", Box((16,), (1,)))
    ]


def load_and_compare(config: Config, expected: Path) -> None:
    """On a rank: what a run resumes with is what another's checkpoint says."""
    training = start_training(config)
    assert training.state == store.read_state(expected)
    wanted = store.named_tensors(training.gpt, training.optimizer.tensors())
    (file,) = [TensorFile(path) for path in expected.glob("*.safetensors")]
    assert wanted.keys() == file.entries.keys()
    assert all(torch.equal(tensor.full_tensor(), file.view(name)) for name, tensor in wanted.items())


def test_a_resharded_run_resumes(saved, tmp_path, capsys):
    target, alone = tmp_path / "resharded", tmp_path / "alone"
    output(capsys, "reshard", saved / "run", "--output", target, *MESHES["tsp4"])
    output(capsys, "reshard", target, "--output", alone, "parallel.tsp=1")
    config = compose(
        [
            *overrides(saved / "corpus", tmp_path, "name=resharded", "model.num_layers=1"),
            *["trainer.train_iters=4", "trainer.micro_batch_size=1", "parallel.tsp=2"],
        ]
    )
    run_distributed(load_and_compare, 2, config, last(alone))


def test_resharding_refuses(saved, copy, tmp_path, capsys):
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="is there and not empty"):
        run(["reshard", str(saved / "run"), "--output", str(there), "parallel.tsp=2"])
    with pytest.raises(ValueError, match="holds .*, which is read"):
        run(["reshard", str(copy), "--output", str(copy), "parallel.tsp=2"])
    new = str(tmp_path / "new")
    for given, message in {
        "parallel.tsp=3": "parallel.tsp=3 must divide it",
        "parallel.tps=2": "unknown key parallel.tps; did you mean",
        "parallel=tsp": "chooses a group's file",
        "parallel.tsp=-1": "or the number of all by launch.nproc",
    }.items():
        with pytest.raises(ValueError, match=message):
            run(["reshard", str(saved / "run"), "--output", new, given])
    with pytest.raises(ValueError, match="does not fit this model"):
        run(["reshard", str(saved / "run"), "--output", new, "model.ffn_hidden_size=47"])
    assert files(tmp_path) == before
    shard = shard_of(last(copy))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="was written with"):
        run(["reshard", str(copy), "--output", new, "parallel.tsp=2"])
    assert not Path(new).exists()


def test_the_command_line(saved, tmp_path, capsys, monkeypatch):
    assert main(["ckpt", "ls", str(saved / "run")]) == 0
    assert main(["ckpt", "verify", str(tmp_path)]) == 2
    assert "no checkpoints in" in capsys.readouterr().err
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "state.json").write_text("{}")
    assert main(["ckpt", "inspect", str(tmp_path / "iter_0000001")]) == 2
    assert "has no manifest.json" in capsys.readouterr().err  # damage is no crash
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="megatsp ckpt is one process"):
        cli._dispatch(["ckpt", "ls", str(saved / "run")])


def test_ls(saved, copy, capsys):
    lines = output(capsys, "ls", saved / "run").splitlines()
    assert [line.split()[0] for line in lines] == ["iteration", "2", "1"]
    assert lines[1].endswith("yes    latest") and "256" in lines[1]
    shard_of(folder_of(copy / "checkpoints", 1)).unlink()
    (copy / "checkpoints" / "iter_0000003.tmp").mkdir()
    (copy / "checkpoints" / "iter_0000003.tmp" / "part").write_bytes(b"x" * 1500)
    (copy / "checkpoints" / BEST).write_text("7\n")
    found = json.loads(output(capsys, "ls", copy / "checkpoints", "--json"))
    first, second = found["checkpoints"]
    assert (first["damage"], first["tokens"], first["pointers"]) == ("", 256, ["latest"])
    assert "is missing" in second["damage"]
    assert found["lost_pointers"] == ["best says 7, which is not there"]
    assert [left["bytes"] for left in found["leftovers"]] == [1500]
    text = output(capsys, "ls", copy)
    assert "damaged: " in text and "1.5 KB: cut off, or abandoned for an older one" in text


def test_inspect(saved, capsys):
    text = output(capsys, "inspect", saved / "run", "--checkpoint", "1", "--tensors", "*.q_proj.*")
    assert "dp_shard 2 x cp 1 x tsp 2" in text and "tensors: 3" in text
    assert "optimizer.exp_avg_sq.model.layers.0.self_attn.q_proj.weight" in text
    found = json.loads(output(capsys, "inspect", last(saved / "run"), "--json"))
    assert found["state"]["iteration"] == 2 and found["mesh"]["tsp"] == 2
    weights, first, second = found["bytes_by_kind"].values()
    assert list(found["bytes_by_kind"]) == ["weights", "exp_avg", "exp_avg_sq"] and weights == first == second
    assert weights == sum(t["bytes"] for t in found["tensors"].values() if t["kind"] == "weights")
    assert found["bytes"] == sum(entry["bytes"] for entry in found["files"].values())
    with pytest.raises(ValueError, match=r"--tensors nothing: no tensor of .* is called so, e\.g\. "):
        run(["inspect", str(saved / "run"), "--tensors", "nothing"])
    with pytest.raises(ValueError, match="is one checkpoint already"):
        run(["inspect", str(last(saved / "run")), "--checkpoint", "last"])
    with pytest.raises(ValueError, match="has no checkpoint 9 .there: iter_0000001, iter_0000002"):
        run(["inspect", str(saved / "run"), "--checkpoint", "9"])
    with pytest.raises(ValueError, match="no checkpoints in"):
        run(["inspect", str(saved / "corpus")])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(shard_of(folder)), "has checksum"),
        (lambda folder: flip(folder / "state.json"), "state.json has checksum"),
        (lambda folder: shard_of(folder).unlink(), "is missing"),
        (lambda folder: shard_of(folder).write_bytes(shard_of(folder).read_bytes()[:-3]), "bytes, has"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_verify_names_damage(copy, capsys, damage, message):
    damage(last(copy))
    text = output(capsys, "verify", copy, "--all", status=1)
    assert f"{folder_of(copy / 'checkpoints', 1)}: " in text  # that one is whole
    (line,) = [line for line in text.splitlines() if line.startswith("damaged: ")]
    assert str(last(copy)) in line and message in line
    assert "whole" in output(capsys, "verify", copy, "--checkpoint", "1")


def poison(folder: Path) -> str:
    """Writes a NaN into a checkpoint as its run would have, checksum and all; returns the tensor's name."""
    shard = shard_of(folder)
    file = TensorFile(shard)
    name, entry = list(file.entries.items())[-1]
    with shard.open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(torch.tensor([float("nan")]).numpy().tobytes())
    manifest = read_manifest(folder)
    entry = FileEntry(shard.stat().st_size, checksum(shard))
    (folder / "manifest.json").unlink()
    write_manifest(folder, type(manifest)({**manifest.files, shard.name: entry}, manifest.tensors))
    return name


def test_values_that_are_no_numbers_and_values_that_differ(saved, copy, capsys):
    name = poison(last(copy))
    assert "whole" in output(capsys, "verify", copy)
    text = output(capsys, "verify", copy, "--finite", status=1)
    assert f"{name}: 1 of " in text and "not finite" in text
    found = json.loads(output(capsys, "diff", saved / "run", copy, "--json", status=1))
    assert [(v["name"], v["different"]) for v in found["values"]] == [(name, 1)]
    assert not found["state"] and not found["settings"] and not found["shapes"]
    (last(copy) / "notes.txt").write_text("mine")
    assert "notes.txt is not in the manifest" in output(capsys, "verify", copy)


def test_diff_of_two_iterations(saved, capsys):
    run_folder = saved / "run"
    options = ["--checkpoint", "1", "--other-checkpoint", "2"]
    found = json.loads(output(capsys, "diff", run_folder, run_folder, *options, "--json", status=1))
    assert "iteration: 1 -> 2" in found["state"] and found["equal_tensors"] == 0
    one, other = (folder_of(run_folder / "checkpoints", n) for n in (1, 2))
    value = next(v for v in found["values"] if v["name"] == "model.norm.weight")
    whole = [torch.cat(sorted_parts(folder, "model.norm.weight")) for folder in (one, other)]
    assert value["max_abs"] == (whole[0].double() - whole[1].double()).abs().max().item()
    assert value["relative"] == value["max_abs"] / whole[0].abs().max().item()
    text = output(capsys, "diff", one, other, status=1)
    assert "iteration: 1 -> 2" in text and "tensors differ" in text
    with pytest.raises(ValueError, match="A and B are both .*iter_0000002: name another"):
        run(["diff", str(run_folder), str(other)])


def test_values_are_compared_by_their_bits(monkeypatch):
    monkeypatch.setattr(ckpt_diff, "_AT_ONCE", 2)
    nan = float("nan")
    one = torch.tensor([1.0, -4.0, 0.0, nan, 2.0])
    assert ckpt_diff.compare("x", one, one.clone()) == ckpt_diff.Values("x", 0, 5, 0.0, 0.0)
    found = ckpt_diff.compare("x", one[:3], torch.tensor([1.5, -4.0, -0.0]))
    assert found == ckpt_diff.Values("x", 2, 3, 0.5, 0.125)
    assert ckpt_diff.compare("x", torch.zeros(1), torch.ones(1)).relative == float("inf")
    assert math.isnan(ckpt_diff.compare("x", torch.ones(5), one).max_abs)


def sorted_parts(folder: Path, name: str) -> list[torch.Tensor]:
    """The parts of a vector, in order."""
    parts = []
    for path in folder.glob("*.safetensors"):
        file = TensorFile(path)
        if name in file.entries:
            places = json.loads(file.metadata["DCP_SHARDING_INFO"])
            parts.append((places[name]["saved_offsets"], file.view(name)))
    return [part for _, part in sorted(parts, key=lambda part: part[0])]


def test_plan(saved, capsys):
    run_folder = saved / "run"
    manifest = read_manifest(last(run_folder))
    all_bytes = 4 * sum(torch.Size(entry.shape).numel() for entry in manifest.tensors.values())
    alone = json.loads(output(capsys, "plan", run_folder, "parallel.tsp=1", "--json"))
    assert alone["world_size"] == 1 and alone["ranks"] == [{"bytes": all_bytes, "files": 4}]
    assert alone["predicted"]["optimizer"] == 2 * alone["predicted"]["weights"] == all_bytes * 2 // 3
    same = json.loads(output(capsys, "plan", run_folder, "--json"))
    assert same["world_size"] == 4 and sum(rank["bytes"] for rank in same["ranks"]) >= all_bytes
    wide = ["parallel.dp_replicate=2", "parallel.tsp=4", "trainer.global_batch_size=8"]
    eight = json.loads(output(capsys, "plan", run_folder, *wide, "--json"))
    assert eight["world_size"] == 8
    assert sum(rank["bytes"] for rank in eight["ranks"]) >= 2 * all_bytes  # each replica reads all
    text = output(capsys, "plan", run_folder, "model.ffn_hidden_size=47", status=1)
    assert "does not fit: " in text and "mlp.gate_proj.weight: wanted (47, 32), found (45, 32)" in text
    text = output(capsys, "plan", run_folder, "launch.nproc=8", "parallel.dp_shard=-1", "parallel.tsp=4")
    assert "fits: every tensor" in text and "on 8 ranks: dp_replicate 1 x dp_shard 2" in text


def test_prune(copy, capsys):
    checkpoints = copy / "checkpoints"
    for iteration in (3, 4):
        shutil.copytree(last(copy), folder_of(checkpoints, iteration))
    (checkpoints / LATEST).write_text("4\n")
    (checkpoints / BEST).write_text("1\n")
    text = output(capsys, "prune", copy, "--keep-last", "1", "--keep", "3", "--dry-run")
    assert "would remove" in text and text.splitlines()[-1].endswith("these stay: 4, 3, 1")
    assert folder_of(checkpoints, 2).exists()
    text = output(capsys, "prune", copy, "--keep-last", "1", "--keep", "3")
    assert f"removed {folder_of(checkpoints, 2)}, " in text and not folder_of(checkpoints, 2).exists()
    shard_of(folder_of(checkpoints, 4)).unlink()
    text = output(capsys, "prune", copy, "--keep-last", "1")
    assert "removed 0 checkpoints" in text  # 3 is the newest good one, 1 the best
    with pytest.raises(ValueError, match="--keep 9: there is no such checkpoint .there: 1, 3, 4"):
        run(["prune", str(copy), "--keep-last", "1", "--keep", "9"])
    with pytest.raises(ValueError, match="--keep-last 0: must be at least 1"):
        run(["prune", str(copy), "--keep-last", "0"])
