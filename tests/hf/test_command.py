"""`megatsp convert` from end to end, in this process, and what it leaves after errors."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hf_models import Made, make, reference, write_tokenizer
from runs import overrides, train_on_ranks, write_corpus
from safetensors.torch import load_file

from megatsp import cli
from megatsp.checkpoint import paths, store
from megatsp.checkpoint.manifest import check_files
from megatsp.compose import from_yaml
from megatsp.hf.command import parse_bytes
from megatsp.hf.hashes import check_hashes, expected_hashes
from megatsp.hf.output import plan_files, whole_folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    make(Made("qwen2", "qwen2", dict(tie_word_embeddings=True), torch.bfloat16), folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run(hf, tmp_path_factory):
    """The run that the command imports, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    assert cli.main(["convert", "import", str(hf), str(folder)]) == 0
    return folder


def fails(capsys, *arguments) -> str:
    """The one message of a command that fails, on stderr; nothing is left half written."""
    assert cli.main(["convert", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_import(run, hf, capsys):
    assert cli.main(["convert", "import", str(hf), str(run), "--force"]) == 0
    printed = capsys.readouterr().out
    assert "31 rows of its embedding have no token" in printed
    assert "the same" in printed and "done in" in printed
    folder = paths.latest(run / "checkpoints")
    assert folder is not None and folder.name == "iter_0000000"
    assert store.read_state(folder).iteration == 0
    listed = check_files(folder).files.keys()
    assert listed == {
        p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.name != "manifest.json"
    }
    assert json.loads((folder / "verification.json").read_text())["passed"]
    assert store.load_tokenizer_of(folder, "").vocab_size == 100
    assert (folder / "hf" / "config.json").read_text() == (hf / "config.json").read_text()
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml"]


def test_export_and_verify(run, hf, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["convert", "export", str(run), str(output), "--max-shard-size", "30KB"]) == 0
    found = {k: v for path in output.glob("*.safetensors") for k, v in load_file(path).items()}
    expected = load_file(hf / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in expected.values())
    sums = expected_hashes(output, output.iterdir())
    assert {path.name for path in sums} == {path.name for path in output.iterdir()} - {"SHA256SUMS"}
    check_hashes(sums)
    assert torch.equal(reference(output)[1], reference(hf)[1])
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(output).encode("!#") == [0, 2]
    capsys.readouterr()
    assert cli.main(["convert", "verify", str(output), str(run)]) == 0
    assert "the same" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_export_in_another_type(run, tmp_path, dtype, kind):
    output = tmp_path / dtype
    assert cli.main(["convert", "export", str(run), str(output), "--dtype", dtype]) == 0
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {kind}
    assert json.loads((output / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_outputs_that_are_there_are_not_replaced(run, hf, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert "is there and not empty: give another folder, or --force" in fails(capsys, "export", run, tmp_path)
    assert "is a file" in fails(capsys, "import", hf, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_what_is_read_is_never_replaced(run, hf, capsys):
    before = sorted(path.name for path in hf.iterdir())
    assert "is nothing that megatsp wrote: remove it" in fails(capsys, "import", hf, hf, "--force")
    (hf / "SHA256SUMS").write_text("")
    assert "which is read: give another folder" in fails(capsys, "import", hf, hf, "--force")
    (hf / "SHA256SUMS").unlink()
    assert "which is read: give another folder" in fails(capsys, "export", run, run, "--force")
    assert sorted(path.name for path in hf.iterdir()) == before
    assert (run / "checkpoints").is_dir()


def test_bad_arguments(run, hf, tmp_path, capsys):
    assert "no checkpoint in" in fails(capsys, "export", hf, tmp_path / "x")
    assert "--merge" in fails(capsys, "export", run, tmp_path / "x", "--merge")
    assert "write e.g. 500MB or 5GB" in fails(
        capsys, "export", run, tmp_path / "x", "--max-shard-size", "5 pounds"
    )
    assert "no checkpoint at" in fails(capsys, "import", tmp_path / "nothing/here/at/all", tmp_path / "x")
    assert "megatsp convert --help" in fails(capsys, "transmute")
    assert not list(tmp_path.iterdir())


def test_a_source_without_a_tokenizer(tmp_path, capsys):
    make(Made("bare", "llama", dict(vocab_size=300)), tmp_path / "hf")
    assert "--tokenizer" in fails(capsys, "import", tmp_path / "hf", tmp_path / "run")
    arguments = [
        "convert",
        "import",
        str(tmp_path / "hf"),
        str(tmp_path / "run"),
        "--tokenizer",
        "byte",
        "--no-verify",
    ]
    assert cli.main(arguments) == 0
    assert "not compared" in capsys.readouterr().out
    assert cli.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "transformers has no tokenizer of this kind (byte)" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*token*"))


def test_an_imported_run_is_trained_and_given_back(tmp_path, capsys, monkeypatch):
    """By `megatsp train` on two ranks: new weights, with all else that the source said."""
    monkeypatch.setattr("megatsp.hf.imported.MAX_FILE_BYTES", 30_000)
    made = Made("small", "llama", dict(vocab_size=300, tie_word_embeddings=True), torch.bfloat16)
    make(made, tmp_path / "hf")
    run = tmp_path / "run"
    assert (
        cli.main(["convert", "import", str(tmp_path / "hf"), str(run), "--tokenizer", "byte", "--no-verify"])
        == 0
    )
    assert len(list(run.rglob("*.safetensors"))) > 1
    model = from_yaml((run / "config.yaml").read_text()).model
    keys = {k: v for k, v in vars(model).items() if isinstance(v, (bool, int, float))}
    same = [f"model.{key}={str(value).lower()}" for key, value in keys.items()]
    corpus = write_corpus(tmp_path / "corpus")
    short = ("trainer.train_iters=3", "data.valid_fraction=0", "parallel.tsp=2")
    train_on_ranks(2, overrides(corpus, tmp_path, "name=run", *same, *short))
    assert cli.main(["convert", "export", str(run), str(tmp_path / "out")]) == 0
    assert "the same" in capsys.readouterr().out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 for name in before)
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_a_check_that_fails(run, hf, tmp_path, capsys, monkeypatch):
    """Weights that are computed otherwise than transformers does: nothing is written, unless asked for."""
    from megatsp.hf import families

    changed = families.FAMILIES["Qwen2ForCausalLM"]
    monkeypatch.setitem(
        families.FAMILIES, "Qwen2ForCausalLM", type(changed)(**{**vars(changed), "rope_theta": 5.0})
    )
    config = json.loads((hf / "config.json").read_text())
    config.pop("rope_parameters")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in hf.iterdir():
        (wrong / path.name).write_bytes(path.read_bytes())
    (wrong / "config.json").write_text(json.dumps(config))
    error = fails(capsys, "import", wrong, tmp_path / "x")
    assert "the check of the conversion failed" in error and "frequencies" in error and "--no-verify" in error
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]
    assert cli.main(["convert", "import", str(wrong), str(tmp_path / "x"), "--no-verify"]) == 0
    assert "not compared" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_does_not_take_it(tmp_path, number):
    with (
        pytest.raises(ValueError, match="the disk is full|Permission denied"),
        whole_folder(tmp_path / "out", False, 0) as folder,
    ):
        (folder / "half").write_text("half")
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="make room"), whole_folder(tmp_path / "out", False, 1 << 60):
        pass


def test_an_interrupt_leaves_nothing(hf, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatsp.hf.output.TensorWriter.write", interrupt)
    assert cli.main(["convert", "import", str(hf), str(tmp_path / "x")]) == 130
    assert not list(tmp_path.iterdir())


def test_values_beyond_fp16(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "megatsp.hf.source.CheckpointSource.read", lambda self, name: torch.full(self.shapes[name], 1e5)
    )
    assert "beyond fp16" in fails(capsys, "export", run, tmp_path / "x", "--dtype", "fp16")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint(run, tmp_path, capsys):
    import shutil

    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    shard = next(broken.rglob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert "is damaged" in fails(capsys, "export", broken, tmp_path / "x")
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{shard.name} has checksum" in fails(capsys, "export", broken, tmp_path / "x")
    shard.unlink()
    assert "is missing" in fails(capsys, "export", broken, tmp_path / "x")


def test_sizes():
    assert [parse_bytes(text) for text in ("7", "7B", "1.5kb", "2 GB")] == [7, 7, 1500, 2 * 10**9]
    shapes = {"a": (10,), "b": (10,), "c": (30,), "d": (1,)}
    assert plan_files(shapes, dict.fromkeys(shapes, "F32"), 80) == [["a", "b"], ["c"], ["d"]]


def test_help(capsys):
    for arguments in (["convert", "--help"], ["convert", "import", "--help"], ["--help"]):
        try:
            assert cli.main(arguments) == 0
        except SystemExit as ended:
            assert ended.code == 0
    assert "--no-verify" in capsys.readouterr().out
