import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from corpora import some_sizes, splits, write
from waiting import LIMIT_S

from megatsp.data import packing, sample_index
from megatsp.data.corpus import Corpus
from megatsp.data.sample_index import DocumentOrder, open_index

PACKINGS = ["concat", "greedy", "best_fit", "pad"]
# A process that opens an index and says whether it built it.
OPEN = """
import sys
sys.path.insert(0, "tests/data")
from corpora import train
from megatsp.data import sample_index
built = []
write = sample_index._write
sample_index._write = lambda *a: (built.append(1), write(*a))
samples = train(sys.argv[1]).sources[0].samples
print(len(built), len(samples), samples.sample(3).tokens.tolist())
"""


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus", some_sizes(60))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR of its own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def tokens(prefix: Path, **more) -> list[list[int]]:
    data = splits(str(prefix), **more).train.sources[0].samples
    return [data.sample(i).tokens.tolist() for i in range(len(data))]


def indices(folder: Path) -> dict[str, int]:
    """Finished ones and when they were."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_second_time_it_is_read(prefix):
    first = tokens(prefix)
    before = indices(prefix.parent / ".sample_index")
    assert len(before) == 2  # of train and of valid
    assert tokens(prefix) == first
    assert indices(prefix.parent / ".sample_index") == before


@pytest.mark.parametrize("how", PACKINGS)
def test_documents_looked_at_a_few_at_a_time_make_the_same_index(prefix, how, tmp_path, monkeypatch):
    whole = tokens(prefix, packing=how, cache=str(tmp_path / "one"))
    monkeypatch.setattr(sample_index, "CHUNK", 7)
    assert tokens(prefix, packing=how, cache=str(tmp_path / "two")) == whole


def test_other_content_under_the_same_name_is_another_index(prefix):
    first = tokens(prefix)
    write(prefix, some_sizes(60, seed=1))
    again = tokens(prefix)
    assert again != first
    write(prefix, some_sizes(60))
    assert tokens(prefix) == first


def test_many_processes_at_once_build_it_once(prefix):
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'kernels'}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, str(prefix)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(4)
    ]
    outputs = [rank.communicate(timeout=LIMIT_S)[0].split(" ", 1) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks)
    assert sum(int(built) for built, _ in outputs) == 2  # train and valid
    assert len({rest for _, rest in outputs}) == 1
    left = [p.name for p in (prefix.parent / ".sample_index").iterdir()]
    assert len(left) == 2 and not any(name.endswith(".tmp") for name in left)


def test_a_read_only_data_folder(prefix, temporary, monkeypatch):
    first = tokens(prefix, cache=str(temporary / "reference"))

    def refuse(self: Path, *arguments: object, **more: object) -> None:
        if ".sample_index" in str(self):
            raise PermissionError(13, "Permission denied")
        os.makedirs(self, exist_ok=True)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert tokens(prefix) == first
    assert not (prefix.parent / ".sample_index").exists()
    found = indices(temporary / f"megatsp-{os.getuid()}" / "sample_index")
    assert len(found) == 2
    assert tokens(prefix) == first
    assert indices(temporary / f"megatsp-{os.getuid()}" / "sample_index") == found


def test_what_lies_beside_the_data_needs_no_temporary_folder(prefix, temporary):
    first = tokens(prefix)
    shutil.rmtree(temporary)
    temporary.mkdir()
    (temporary / f"megatsp-{os.getuid()}").mkdir()
    (temporary / f"megatsp-{os.getuid()}").chmod(0o777)
    assert tokens(prefix) == first
    with pytest.raises(ValueError, match="belongs to another user or can be written to by others"):
        tokens(prefix, seq_length=17)


def test_what_killed_builds_left_is_swept_a_day_later(prefix):
    folder = prefix.parent / ".sample_index"
    old, young = folder / "0.old.tmp", folder / "0.young.tmp"
    for left in (old, young):
        left.mkdir(parents=True)
        (left / "concat").write_bytes(b"half")
    os.utime(old, (0, 0))
    tokens(prefix)
    assert young.exists() and not old.exists()


def test_no_folder_to_write_to(prefix, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"no room for the sample index of .*set data.cache to a folder"):
        tokens(prefix, cache=str(tmp_path / "file"))


def test_an_index_that_is_not_whole_is_built_again(prefix):
    first = tokens(prefix)
    for folder in (prefix.parent / ".sample_index").iterdir():
        (folder / "meta.json").write_text(json.dumps({"description": "cut o"})[:-3])
    assert tokens(prefix) == first
    for folder in (prefix.parent / ".sample_index").iterdir():
        with (folder / "concat").open("r+b") as file:
            file.truncate(16)
    with pytest.raises(ValueError, match="is damaged: remove it, it is built again"):
        tokens(prefix)


def test_a_build_that_fails_leaves_nothing(prefix, tmp_path, monkeypatch):
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_index, "_append", full)
    with pytest.raises(ValueError, match="No space left on device"):
        tokens(prefix, cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("how", ["concat", "greedy", "best_fit"])
def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch, how):
    """Ten times the documents, no more than a little more memory: nothing is listed but a chunk."""
    monkeypatch.setattr(sample_index, "CHUNK", 1000)
    monkeypatch.setattr(packing, "WINDOW", 2000)

    def peak(documents: int) -> int:
        class Many(Corpus):
            num_documents, source, key = documents, "many", str(documents)

            def __init__(self) -> None: ...

            def sizes(self, chosen: np.ndarray) -> np.ndarray:
                return 2 + chosen % 37

        order = DocumentOrder(documents, 1, 0, documents)
        tracemalloc.start()
        index = open_index(Many(), order, 1, 100, how, "split", str(tmp_path))
        assert index.num_samples > documents * 10 / 100
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(60_000) < 1.3 * peak(6_000)
