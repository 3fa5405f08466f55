import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatsp.data.indexed import IndexedDocuments
from megatsp.data.sample_index import DocumentOrder
from megatsp.data.splits import split_documents
from megatsp.data.tokenizer import load_tokenizer, train_bpe

RECIPE = Path(__file__).parents[2] / "data" / "python_stdlib" / "prepare.py"
BODY = "def function(argument):\n    return argument + {}\n"


def read(corpus: IndexedDocuments, document: int) -> np.ndarray:
    return corpus.tokens(document, 0, int(corpus.sizes[document]))


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("python_stdlib_prepare", RECIPE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    kept = {"z.py": "last = 1\r\n", "a/b.py": "é = 2\n", "a.py": "3\n", "a/__init__.py": "4\n"}
    left_out = ["test/t.py", "a/tests/t.py", "site-packages/p.py", "__pycache__/c.py", "config-3.11/c.py"]
    left_out += ["_sysconfigdata_x.py", "notes.txt"]
    for name, text in (kept | dict.fromkeys(left_out, "left out\n") | {"empty.py": ""}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n'\xe9'\n")
    return folder


def test_byte_corpus(
    recipe: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out" / "byte"
    recipe.main(["--source", str(source), "--output", str(prefix)])
    corpus = IndexedDocuments(prefix)
    names = ["a.py", "a/__init__.py", "a/b.py", "z.py"]
    assert [corpus.name(i) for i in range(4)] == [f"{name} document 0" for name in names]
    assert [bytes(read(corpus, i)[:-1].astype("u1")) for i in range(4)] == [
        (source / name).read_bytes() for name in names
    ]
    printed = capsys.readouterr().out
    assert f"wrote {prefix}" in printed
    assert "4 documents, 21 bytes, 25 tokens, 0.840 bytes per token, vocab_size 257" in printed
    assert "skipped: 1 empty, 1 not UTF-8" in printed


def test_current_output_is_kept_and_other_output_needs_force(
    recipe: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(source), "--output", str(tmp_path / "out" / "byte")]
    recipe.main(arguments)
    written = (tmp_path / "out" / "byte.bin").stat().st_mtime_ns
    recipe.main(arguments)
    assert "kept " in capsys.readouterr().out
    assert (tmp_path / "out" / "byte.bin").stat().st_mtime_ns == written
    recipe.main([*arguments, "--force"])
    assert "kept " not in capsys.readouterr().out

    (source / "z.py").write_text("changed\n")
    before = (tmp_path / "out" / "byte.bin").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        recipe.main(arguments)
    assert "--force replaces it" in capsys.readouterr().err
    assert (tmp_path / "out" / "byte.bin").read_bytes() == before
    recipe.main([*arguments, "--force"])
    assert (tmp_path / "out" / "byte.bin").read_bytes() != before


def test_truncated_output_is_not_kept(
    recipe: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(source), "--output", str(tmp_path / "out" / "byte")]
    recipe.main(arguments)
    (tmp_path / "out" / "byte.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        recipe.main(arguments)
    assert "truncated" in capsys.readouterr().err
    recipe.main([*arguments, "--force"])
    assert IndexedDocuments(tmp_path / "out" / "byte").num_documents == 4


def test_interrupted_output_is_written_again(recipe: ModuleType, source: Path, tmp_path: Path) -> None:
    arguments = ["--source", str(source), "--output", str(tmp_path / "out" / "byte")]
    recipe.main(arguments)
    (tmp_path / "out" / "byte.json").unlink()
    recipe.main(arguments)
    assert IndexedDocuments(tmp_path / "out" / "byte").num_documents == 4


def test_bpe_is_trained_on_the_training_split_alone(recipe: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = [BODY.format(i) + f"{chr(97 + i)}{chr(107 + i)} " * 50 for i in range(10)]
    for i, text in enumerate(texts):
        (source / f"{i}.py").write_text(text)
    prefix = tmp_path / "out" / "tokens"
    arguments = [
        "--source",
        str(source),
        "--output",
        str(prefix),
        "--tokenizer",
        "bpe",
        "--vocab-size",
        "290",
    ]
    recipe.main([*arguments, "--valid-fraction", "0.3", "--seed", "2"])
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    order = DocumentOrder(10, 2, *split_documents(10, 0.3)["train"])
    train = sorted(order(0, 7).tolist())
    expected = train_bpe([texts[i] for i in train], 290, tmp_path / "expected.json")
    everything = train_bpe(texts, 290, tmp_path / "everything.json")
    assert tokenizer.fingerprint == expected.fingerprint != everything.fingerprint

    corpus = IndexedDocuments(prefix)
    assert [tokenizer.decode(read(corpus, i).tolist()) for i in range(10)] == texts
    assert (
        int(tokenizer.bytes_per_token()[np.concatenate([read(corpus, i) for i in range(10)])].sum())
        == corpus.info.bytes
    )
    assert corpus.info.tokenizer_fingerprint == tokenizer.fingerprint


def test_nothing_to_prepare(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in [(tmp_path / "missing", "is not a folder"), (tmp_path, "no usable .py file")]:
        with pytest.raises(SystemExit, match="2"):
            recipe.main(["--source", str(folder), "--output", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
