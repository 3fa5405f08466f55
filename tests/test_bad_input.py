"""Every mistake of a user's is one message and exit status 2, and changes nothing that was there."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import RANK_VARIABLES, command, files, overrides, train_on_ranks, write_corpus
from torch.distributed.elastic.multiprocessing import errors
from waiting import LIMIT_S

from megatsp import cli
from megatsp.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a finished run, a run without a checkpoint, and a folder that is no run."""
    folder = tmp_path_factory.mktemp("bad")
    write_corpus(folder / "corpus")
    train_on_ranks(1, overrides(folder / "corpus", folder / "outputs", "trainer.train_iters=3"))
    (folder / "outputs" / "thesis").mkdir()
    (folder / "outputs" / "thesis" / "thesis.tex").write_text("years of work")

    write_corpus(folder / "short", documents=2)
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"corpus{suffix}", folder / f"emptied{suffix}")
        (folder / f"hollow{suffix}").touch()
    (folder / "emptied.bin").write_bytes(b"")
    header = (folder / "corpus.idx").read_bytes()[:18]
    for suffix in (".bin", ".json"):
        shutil.copy(folder / f"corpus{suffix}", folder / f"none{suffix}")
    (folder / "none.idx").write_bytes(header + (0).to_bytes(8, "little") + (1).to_bytes(8, "little"))
    train_bpe(["the sun rose over a quiet harbour"] * 3, 262, folder / "tokenizer.json")
    return folder


@pytest.fixture
def refused(folder: Path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs `megatsp train` as the one rank of a world, and returns the one message that it ends with."""

    def end(status: int) -> None:
        raise SystemExit(status)

    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(errors, "record", lambda work: work)  # it would turn faults of the tests to a file

    def run(*more: str) -> str:
        before = files(folder)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", *overrides(folder / "corpus", folder / "outputs", *more)])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert files(folder) == before and not dist.is_initialized()
        assert err.startswith("megatsp: error: ") and err.count("megatsp: error") == 1
        assert "Traceback" not in err
        return err

    return run


SETTINGS = [
    ("trainer.seq_length=30 parallel.tsp=4", "2 * parallel.tsp = 8 must divide it; use 24 or 32"),
    ("model.hidden_size=34 parallel.tsp=4", "parallel.tsp=4 must divide it; use 32 or 36"),
    ("parallel.tsp=3 trainer.seq_length=36", "tsp 3 does not divide the 1 ranks; start 3 ranks"),
    ("parallel.dp_shard=2", "dp_shard 2 does not divide the 1 ranks; start 2 ranks"),
    ("parallel.attention_buckets=3", "must divide model.num_query_groups=2; use one of 1, 2, or 0"),
    ("parallel.tsp_layout=owners", "choose one of hidden, owner; did you mean owner?"),
    ("parallel.tsp_layuot=owner", "unknown key parallel.tsp_layuot; did you mean parallel.tsp_layout?"),
    ("modle=gpt_tiny", "unknown key modle; did you mean model?"),
    ("model=gpt_tyni", "unknown choice model=gpt_tyni; did you mean gpt_tiny?"),
    ("trainer.dtype=fp8", "trainer.dtype=fp8: choose one of fp32, bf16"),
    ("trainer.train_iters=many", "trainer.train_iters=many: expected a whole number, got str"),
    ("parallel.pp=2", "parallel.pp=2: only 1 in this version; shard with parallel.tsp"),
    ("trainer.global_batch_size=3", "micro_batch_size=2 x 1 data-parallel ranks must divide it; use 2 or 4"),
    ("optimizer=apex_fused_adam", "optimizer=apex_fused_adam needs NVIDIA's or ROCm's apex"),
    ("launch.device=cuda", "launch.device=cuda, but torch sees no GPU"),
]
DATA = [
    ("data.path={folder}/absent", "no data at {folder}/absent: {folder}/absent.bin is missing"),
    ("data.path={folder}/hollow", "{folder}/hollow.json is not valid JSON"),
    ("data.path={folder}/none", "{folder}/none.idx has no documents"),
    ("data.path={folder}/emptied", "{folder}/emptied.bin is truncated or not the one that was indexed"),
    (
        "data.path={folder}/short",
        "data.valid_fraction 0.25 and data.test_fraction 0.0 of 2 documents leave none for the valid split",
    ),
    ("trainer.seq_length=6400", "one sample of seq_length 6400 needs 6401: lower seq_length"),
    ("model.vocab_size=256", "model.vocab_size is 256, but {folder}/corpus needs 257"),
    ("data.tokenizer={folder}/tokenizer.json", "was written with another tokenizer: 'byte'"),
    ("data.tokenizer={folder}/absent.json", "no tokenizer at {folder}/absent.json"),
]
FOLDERS = [
    ("model.hidden_size=48", "holds another run; it differs in model.hidden_size: 32 there, 48 now"),
    ("trainer.seed=7", "holds another run; it differs in trainer.seed: 1234 there, 7 now"),
    ("name=thesis", "thesis exists and is not a run of megatsp: choose another name="),
]


@pytest.mark.parametrize(("settings", "message"), [*SETTINGS, *DATA, *FOLDERS])
def test_refused_before_anything_is_written(folder, refused, settings, message):
    if settings not in {given for given, _ in FOLDERS}:
        settings += " name=new"
    message = message.format(folder=folder)
    assert message in refused(*settings.format(folder=folder).split())


def test_a_file_that_is_no_run_is_not_replaced(folder, refused):
    (folder / "outputs" / "file").write_text("not a run")
    assert "file exists and is not a run of megatsp" in refused("name=file")


def test_a_damaged_pointer_is_named(folder, refused):
    shutil.copytree(folder / "outputs" / "run", folder / "outputs" / "pointless")
    pointer = folder / "outputs" / "pointless" / "checkpoints" / "latest_checkpointed_iteration.txt"
    for text, message in (
        ("9\n", "iter_0000009 is not there"),
        ("nine", f"{pointer} is missing or names no"),
    ):
        pointer.write_text(text)
        assert message in refused("name=pointless", "checkpoint.strict=true")


def test_two_ranks_that_refuse_say_it_once(folder):
    before = files(folder)
    given = overrides(folder / "absent", folder / "outputs", "name=new", "launch.nproc=2", "parallel.tsp=2")
    job = command("train", *given)
    out, err = job.communicate(timeout=LIMIT_S)
    assert (job.returncode, out) == (2, "")
    expected = f"no data at {folder}/absent: {folder}/absent.bin is missing; prepare the data again"
    assert err == f"megatsp: error: {expected}\n"
    assert files(folder) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_documents(folder):
    """A resumed run whose first steps throw the weights so far away that soon there is no loss."""
    shutil.copytree(folder / "outputs" / "run", folder / "outputs" / "exploding")
    before = files(folder / "outputs" / "exploding" / "checkpoints")
    more = ["optimizer.lr=1e18", "trainer.train_iters=9", "launch.nproc=2", "parallel.tsp=2"]
    job = command("train", *overrides(folder / "corpus", folder / "outputs", "name=exploding", *more))
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 2
    assert re.match(r"megatsp: error: iteration [4-9]: loss (nan|inf), gradient norm (nan|inf); nothing", err)
    assert "\nDocuments of the samples whose loss is not finite: doc" in err
    assert err.endswith("the last checkpoint is of iteration 3\n") and "Traceback" not in err
    assert files(folder / "outputs" / "exploding" / "checkpoints") == before


def test_a_gradient_that_is_not_finite_stops_a_new_run_before_its_first_update(folder):
    more = ["name=wild", "model.init_method_std=1e18", "trainer.max_bad_steps=1"]
    job = command("train", *overrides(folder / "corpus", folder / "outputs", *more))
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 2
    assert re.match(r"megatsp: error: iteration 1: loss \S+, gradient norm nan; nothing was updated\.\n", err)
    assert re.search(r"\nDocuments of the .*: doc", err)
    assert err.endswith("the last checkpoint is of iteration 0, that is none\n")
    assert not (folder / "outputs" / "wild" / "checkpoints").exists()
