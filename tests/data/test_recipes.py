"""The recipes in data/ on small files with the columns of the real ones, and the presets that read them."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from preprocess_jobs import write_parquet
from runs import start_training

from megatsp.compose import compose
from megatsp.data.indexed import IndexedDocuments
from megatsp.data.splits import Splits, load_splits
from megatsp.data.tokenizer import load_tokenizer
from megatsp.schema import Config
from megatsp.training.logs import read_metrics
from megatsp.validate import validate

ROOT = Path(__file__).parents[2]
PAGES = [f"Page {i} says that the river is {i * 37 % 11} metres deep and {i} wide." for i in range(40)]
CODE = "def function_{}(argument):\n    return argument + {}\n"


def run(folder: Path, recipe: str, *arguments: object, status: int = 0) -> str:
    """What a recipe's script says, started in a folder of data."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    script = ROOT / "data" / recipe
    command = [sys.executable] if script.suffix == ".py" else []
    result = subprocess.run(
        [*command, script, *map(str, arguments)], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == status, result.stdout
    return result.stdout


def texts(prefix: str | Path, tokenizer: str | Path) -> list[str]:
    """The documents, special tokens included, that a recipe wrote."""
    loaded, corpus = load_tokenizer(str(tokenizer)), IndexedDocuments(prefix)
    names = {i: name for name, i in loaded.special_tokens.items()}

    def spelled(ids: list[int]) -> str:
        text, plain = "", []
        for i in [*ids, None]:
            if i is None or i in names:
                text += loaded.decode(plain) + names.get(i, "")
                plain = []
            else:
                plain.append(i)
        return text

    sizes = corpus.sizes.tolist()
    return [spelled(corpus.tokens(i, 0, size).tolist()) for i, size in enumerate(sizes)]


def splits(*overrides: str) -> tuple[Config, Splits]:
    """What a training with a preset reads from the current folder."""
    given = [*overrides, "model.vocab_size=512", "trainer.seq_length=32"]
    config = validate(compose(given), world_size=1)
    return config, load_splits(config, load_tokenizer(config.data.tokenizer))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example was prepared."""
    folder = tmp_path_factory.mktemp("example")
    run(folder, "jsonl_example/prepare.sh")
    return folder


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which FineWeb-Edu was prepared, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("fineweb")
    source = folder / "sample" / "10BT"
    source.mkdir(parents=True)
    for shard, pages in enumerate((PAGES[:25], PAGES[25:])):
        columns: dict[str, list[Any]] = {
            "text": pages,
            "id": [f"<urn:uuid:{i}>" for i in range(len(pages))],
            "dump": ["CC-MAIN-2024-10"] * len(pages),
            "url": ["https://example.org"] * len(pages),
            "score": [3.5] * len(pages),
            "int_score": [4] * len(pages),
        }
        write_parquet(source / f"00{shard}_00000.parquet", columns)
    (source / "README.md").write_text("not data")
    run(folder, "fineweb_edu/prepare.sh", "--source", source, "--vocab-size", 300, "--workers", 2)
    return folder


def test_jsonl_example(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(example / "outputs" / "data" / "jsonl_example")
    records = [
        json.loads(line) for line in (ROOT / "data/jsonl_example/documents.jsonl").read_text().splitlines()
    ]
    for key in ("title", "text"):
        expected = [f"{record[key]}<|endoftext|>" for record in records]
        assert texts(f"example_{key}_document", "tokenizer") == expected
    chats = texts("example_chat_document", "tokenizer")
    assert chats[1] == (
        "<|im_start|>user\nWhat is a tokenizer?<|im_end|>\n<|im_start|>assistant\n"
        "It turns text into ids of tokens, and ids back into text.<|im_end|>\n"
    )

    monkeypatch.chdir(example)
    assert len(splits("data=jsonl_example")[1].train) > 20
    assert (example / "outputs/data/jsonl_example/second.jsonl.gz").stat().st_size > 100


def test_the_sft_experiment_trains_on_the_example(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(example)
    given = ["trainer.train_iters=2", "scheduler.lr_warmup_iters=0"]
    given += ["logging.wandb=disabled", "data.num_workers=0"]
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_hf_checkpoint import make

    make("qwen3", Path("outputs/hf/qwen3_tiny"), Path("outputs/data/jsonl_example/tokenizer"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # quicker than a rank
    try:
        start_training(compose(["experiment=sft_example", *given], primary="sft")).run()
    finally:
        dist.destroy_process_group()
    entries = read_metrics(example / "outputs" / "sft_example" / "metrics.jsonl")
    assert [entry["iteration"] for entry in entries if "val/lm loss" in entry] == [0, 2]


def test_fineweb_edu(fineweb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fineweb)
    folder = "outputs/data/fineweb_edu"
    assert texts(f"{folder}/tokens_text_document", f"{folder}/tokenizer") == [
        f"{page}<|endoftext|>" for page in PAGES
    ]
    _, found = splits("data=fineweb_edu", "data.valid_fraction=0.1")
    assert len(found.train) > 10 and found.valid is not None


def test_c4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "en"
    source.mkdir()
    names = ("train.00000-of-01024", "train.00001-of-01024", "validation.00000-of-00008")
    for i, name in enumerate(names):
        lines = [
            json.dumps({"text": page, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"})
            for page in PAGES[i * 12 : i * 12 + 12]
        ]
        (source / f"c4-{name}.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    run(tmp_path, "c4/prepare.sh", "--source", f"{source}/", "--vocab-size", 300)
    monkeypatch.chdir(tmp_path)
    config, found = splits("data=c4")
    expected = [f"{page}<|endoftext|>" for page in PAGES]
    assert texts(config.data.path[0], config.data.tokenizer) == expected[:24]
    assert texts(config.data.valid_path[0], config.data.tokenizer) == expected[24:36]
    assert len(found.train) > 10 and found.valid is not None


def test_prolong(fineweb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repositories from a folder and from records whose order is mixed; books from both."""
    folder = fineweb / "source"
    files = {f"{repo}/src/{i}.py": CODE.format(i, repo) for repo in ("a", "b") for i in range(6)}
    files |= {
        "small/a.py": "x = 1\n",
        "a/.git/config": "hidden\n",
        "book.txt": "Once there was a river. " * 30,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "b" / "src" / "latin.py").write_bytes(b"'\xe9'\n" * 100)
    records = [{"repo": f"r{i % 2}", "path": f"{9 - i}.py", "text": CODE.format(i, i)} for i in range(10)]
    records += [{"text": "Another book. " * 50}, {"repo": "large", "path": "x", "text": "y" * 1000}]
    (fineweb / "code.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    sizes = ("--min-bytes", 200, "--max-bytes", 750)
    arguments = ("prolong/prepare.py", "--source", folder, fineweb / "code.jsonl", *sizes)
    printed = run(fineweb, *arguments)
    assert "1 files that are not UTF-8" in printed
    assert "1 documents below --min-bytes" in printed  # of the repository small
    assert "1 files above --max-bytes" in printed
    assert "kept " in run(fineweb, *arguments)  # and so an interrupted job goes on

    monkeypatch.chdir(fineweb)
    config, found = splits("data=prolong", "data.valid_fraction=0.2")
    assert config.data.packing == "best_fit"
    long, tokenizer = "outputs/data/prolong/long_text_document", "outputs/data/fineweb_edu/tokenizer"
    expected = ["\n".join(files[f"{repo}/src/{i}.py"] for i in range(6)) for repo in ("a", "b")]
    expected += ["\n".join(CODE.format(i, i) for i in range(10 - parity, -1, -2)) for parity in (1, 2)]
    expected += [files["book.txt"], records[10]["text"]]
    assert sorted(texts(long, tokenizer)) == sorted(f"{text}<|endoftext|>" for text in expected)
    drawn = [draw.source for draw in found.train.draw(0, 100)]
    assert drawn.count(0) == 60 and drawn.count(1) == 40


def test_prolong_cuts_large_repositories_between_files(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / "source" / "repo").mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / "repo" / f"{i}.py").write_text(f"{i}" * 99)
    run(
        tmp_path, "prolong/prepare.py", "--source", "source", "--output", "out", "--tokenizer", "byte",
        "--min-bytes", 150, "--max-bytes", 250,
    )  # fmt: skip
    lines = (tmp_path / "out" / "long.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [
        "0" * 99 + "\n" + "1" * 99, "2" * 99 + "\n" + "3" * 99,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--source", "records"), "holds x.jsonl: name files of records themselves"),
        (("--source", "records/x.jsonl"), "x.jsonl line 1: no text under text: the record has content"),
        (("--source", "records/x.jsonl", "--text-key", "content"), "no document of at least --min-bytes"),
        (("--source", "nowhere"), "there is no such file or folder"),
        (("--source", "records", "--min-bytes", 0), "must be from 1 to --max-bytes"),
    ],
)
def test_what_prolong_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "data" / "prolong"))
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x.jsonl").write_text('{"content": "short"}\n')
    import prepare

    with pytest.raises(SystemExit, match="2"):
        prepare.main([str(argument) for argument in arguments])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("long.jsonl"))


def test_ultrachat(fineweb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fineweb / "data"
    source.mkdir()
    for split, count in (("train_sft", 12), ("test_sft", 4), ("train_gen", 2)):
        contents = [
            (f"How deep is river {i}?", f"It is {i} metres deep.", "Sure?", "Yes.") for i in range(count)
        ]
        roles = ("user", "assistant") * 2
        columns: dict[str, list[Any]] = {
            "prompt": [turns[0] for turns in contents],
            "prompt_id": [f"{i:064}" for i in range(count)],
            "messages": [
                [{"content": text, "role": role} for text, role in zip(turns, roles, strict=True)]
                for turns in contents
            ],
        }
        write_parquet(source / f"{split}-00000-of-00001-a3ecf92756993583.parquet", columns)
    template = ROOT / "data" / "chatml.jinja"
    tokenizer = "outputs/data/fineweb_edu/tokenizer"
    arguments = ["--source", "data", "--tokenizer", tokenizer, "--chat-template", template]
    run(fineweb, "ultrachat/prepare.sh", *arguments)

    monkeypatch.chdir(fineweb)
    config, found = splits("data=ultrachat")
    chats = texts(config.data.path[0], tokenizer)
    assert len(chats) == 12 and len(texts(config.data.valid_path[0], tokenizer)) == 4
    assert chats[3].startswith(
        "<|im_start|>user\nHow deep is river 3?<|im_end|>\n<|im_start|>assistant\nIt is 3"
    )
    sample = found.train.sample(found.train.draw(0, 1)[0])
    assert 0 < sample.mask.sum() < sample.mask.size


@pytest.mark.parametrize(
    "recipe, arguments, message",
    [
        ("c4", (), "--source is missing"),
        ("c4", ("--source",), "--source needs a value"),
        ("c4", ("--source", "here", "--tokenizer", "byte"), "no file matches"),
        ("ultrachat", ("--source", "here"), "--tokenizer is missing"),
        ("fineweb_edu", ("--source", ".", "--tokenizer", "byte"), "the folder has no parquet files"),
    ],
)
def test_what_the_scripts_refuse(
    tmp_path: Path, recipe: str, arguments: tuple[str, ...], message: str
) -> None:
    assert message in run(tmp_path, f"{recipe}/prepare.sh", *arguments, status=2)
    assert list(tmp_path.iterdir()) == []
