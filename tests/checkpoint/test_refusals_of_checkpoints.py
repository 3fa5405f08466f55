"""A checkpoint that is damaged, of another model, of the future or not to be trusted is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import relist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from megatsp.checkpoint.manifest import MANIFEST, Damaged, check_files, check_folder, read_manifest, sealed
from megatsp.checkpoint.paths import LATEST, chosen, folder_of, latest, read_pointer
from megatsp.checkpoint.state import RunState, state_from_json, state_to_json
from megatsp.checkpoint.storage import PLACES, are_disjoint
from megatsp.checkpoint.store import load, read_state, write
from megatsp.ckpt.verify import verify
from megatsp.compose import from_yaml, to_yaml
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.hf.kept import stored_files
from megatsp.schema import Config

STATE = RunState(
    iteration=3, consumed_samples=12, skipped_samples=((4, 8), (9, 10)), recent_losses=(2.5, 2.0)
)
EXTRA = {"config.yaml": to_yaml(Config()).encode(), "hf/config.json": b"{}"}
MOMENT = "optimizer.exp_avg.up.weight"
SHARD = "shard-00001-of-00001.safetensors"


def model(width: int = 5, layers: tuple[str, ...] = ("up", "down")) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(3, width, bias=False) for name in layers})


def tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {**{name: p.detach() for name, p in net.named_parameters()}, MOMENT: torch.rand(5, 3)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, made in this process alone."""
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    written = write(checkpoints, STATE, tensors(model()), EXTRA, ByteTokenizer())
    assert written.folder == folder_of(checkpoints, 3) and (checkpoints / LATEST).read_text() == "3\n"
    assert written.bytes == sum(p.stat().st_size for p in written.folder.rglob("*.*") if p.name != MANIFEST)
    return written.folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "iter_0000003")


def test_what_was_written_is_read(whole):
    net, moment = model(), torch.zeros(5, 3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.data.fill_(torch.nan)
    state = load(whole, net, {MOMENT: moment})
    assert state == RunState(
        **{**vars(STATE), "tokenizer": "byte", "tokenizer_fingerprint": ByteTokenizer().fingerprint}
    )
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters()) and moment.any()
    assert state_from_json(state_to_json(STATE).decode()) == STATE  # tuples again
    # torch's own reader finds the same tensors in it.
    found = HuggingFaceStorageReader(str(whole)).read_metadata().state_dict_metadata
    assert {name: tuple(t.size) for name, t in found.items()} == {
        name: entry.shape for name, entry in read_manifest(whole).tensors.items()
    }


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of a tensor": (lambda f: flip(f / SHARD, -1), SHARD + " has checksum"),
    "a byte of a header": (lambda f: flip(f / SHARD, 9), "is damaged"),
    "the header's length": (lambda f: flip(f / SHARD, 6), "its header would have"),
    "cut off": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]), "bytes, has [0-9]+ bytes"),
    "deleted": (lambda f: (f / SHARD).unlink(), "bytes, is missing; restore it"),
    "a folder": (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), "is damaged"),
    "a small file": (lambda f: flip(f / "config.yaml", -2), "config.yaml has checksum"),
    "the state": (lambda f: flip(f / "state.json", 0), "cannot read state.json"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "has no manifest.json, so it is no whole checkpoint"),
    "half a manifest": (lambda f: os.truncate(f / MANIFEST, 99), "manifest.json is no JSON"),
    "another's manifest": (lambda f: (f / MANIFEST).write_text('{"a": 1}'), "is none of megatsp-checkpoint"),
    "an empty manifest": (lambda f: edit(f, lambda m: m.pop("files")), "not laid out as one: KeyError"),
    "a strange size": (lambda f: edit(f, lambda m: m["files"][SHARD].update(bytes="9")), "as one: Value"),
    "a byte of the manifest": (lambda f: replace_in(f / MANIFEST, "5", "4"), "is not what was written, by"),
    "the manifest's version": (lambda f: replace_in(f / MANIFEST, ": 1,", ": 0,"), "is not what was written"),
    "no checksum of the manifest": (
        lambda f: edit(f, lambda m: None, json.dumps), "not laid out as one: ValueError no xxh3_128"
    ),
    "a shard left out": (lambda f: edit(f, lambda m: m["files"].pop(SHARD)), "is not made by its 0 parts"),
    "not there": (lambda f: shutil.rmtree(f), "is not there"),
}  # fmt: skip


def replace_in(path: Path, before: str, after: str) -> None:
    path.write_text(path.read_text().replace(before, after, 1))


def edit(folder: Path, change: Callable[[dict], object], text: Callable[[dict], str] = sealed) -> None:
    """The manifest as its writer might have changed it."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["xxh3_128"]
    change(content)
    (folder / MANIFEST).write_text(text(content))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(copy, damage):
    harm, message = DAMAGE[damage]
    harm(copy)
    with pytest.raises(Damaged, match=message) as caught:
        load(copy, model(), {MOMENT: torch.zeros(5, 3)})
    assert str(copy) in str(caught.value)


def test_checksums_are_left_out_where_sizes_are_asked_for(copy):
    flip(copy / SHARD, -1)
    load(copy, model(), {MOMENT: torch.zeros(5, 3)}, verify="sizes")
    check_folder(copy)  # a large file is for the loading to read
    with pytest.raises(Damaged, match="has checksum"):
        check_files(copy)


@pytest.mark.parametrize(
    ("net", "moments", "message"),
    [
        (model(6), [MOMENT], r"3 tensors differ: up.weight: wanted \(6, 3\), found \(5, 3\)"),
        (model(5, ("up", "down", "on")), [MOMENT], r"1 tensors differ: on.weight: wanted .*, found nothing"),
        (model(5, ("up",)), [MOMENT], r"1 tensors differ: down.weight: wanted nothing, found \(5, 3\)"),
        (model(5, ("up",)), [], r"1 tensors differ: down.weight: wanted nothing"),
        (model(), [MOMENT, "optimizer.rotor"], "1 tensors differ: optimizer.rotor: wanted .*, found nothing"),
    ],
)  # fmt: skip
def test_another_model_is_no_damage(whole, net, moments, message):
    width = net["up"].weight.shape[0]
    with pytest.raises(ValueError, match="does not fit this model; " + message) as caught:
        load(whole, net, {name: torch.zeros(width, 3) for name in moments})
    assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize("change", [{"dtype": "BF16"}, {"shape": [5, 4]}, {"shape": [4, 3]}, {"shape": [15]}])
def test_parts_make_the_tensors_of_the_manifest(copy, change):
    edit(copy, lambda manifest: manifest["tensors"][MOMENT].update(change))
    with pytest.raises(Damaged, match=f"{MOMENT}, .* is not made by its 1 parts"):
        load(copy, model(), {})
    edit(copy, lambda manifest: manifest["tensors"].pop(MOMENT))
    with pytest.raises(Damaged, match=f"{MOMENT} is not in the manifest"):
        load(copy, model(), {})


@pytest.mark.parametrize(
    ("boxes", "disjoint"),
    [
        ([], True),
        ([((), ()), ((), ())], False),
        ([((0,), (2,)), ((2,), (3,))], True),
        ([((2,), (3,)), ((0,), (3,))], False),
        ([((0,), (9,)), ((1,), (1,)), ((5,), (1,))], False),
        ([((1,), (0,)), ((0,), (3,))], True),  # an empty one
        ([((0, 0), (2, 3)), ((0, 3), (2, 1)), ((2, 0), (1, 4))], True),
        ([((0, 0), (2, 3)), ((0, 2), (2, 2)), ((2, 0), (1, 4))], False),
        ([((0, 0), (3, 1)), ((1, 1), (1, 1)), ((2, 0), (1, 2))], False),
        ([((i, 0), (1, 4)) for i in range(5000)], True),
        ([((0, i), (4, 1)) for i in range(5000)] + [((3, 17), (1, 1))], False),
    ],
)
def test_boxes_that_overlap_are_found(boxes, disjoint):
    assert are_disjoint(boxes) == disjoint == are_disjoint(boxes[::-1])


def test_parts_that_overlap_are_refused(copy):
    """Two files of halves of a tensor, the second of which says that it begins a row earlier."""
    (copy / SHARD).unlink()
    for i, rows, at in ((1, 3, 0), (2, 2, 3)):
        places = {MOMENT: {"saved_offsets": [at, 0]}}
        parts = {MOMENT: torch.ones(rows, 3)} | (
            {} if i > 1 else tensors(model()) | {MOMENT: torch.ones(3, 3)}
        )
        places |= {name: {"saved_offsets": [0, 0]} for name in parts if name != MOMENT}
        save_file(parts, copy / f"shard-{i:05d}-of-00002.safetensors", {PLACES: json.dumps(places)})
    load(relist(copy), model(), {MOMENT: torch.zeros(5, 3)})
    # As many elements in all, at different places, inside of the tensor: rows 2 and 3, then a hole.
    replace_in_bytes(copy / "shard-00002-of-00002.safetensors", b"[3, 0]", b"[2, 0]")
    relist(copy)
    edit(copy, lambda manifest: manifest["tensors"][MOMENT].update(shape=[5, 3]))
    check_files(copy)
    with pytest.raises(Damaged, match=f"{MOMENT}, .* is not made by its 2 parts"):
        load(copy, model(), {MOMENT: torch.zeros(5, 3)})


def replace_in_bytes(path: Path, before: bytes, after: bytes) -> None:
    assert path.read_bytes().count(before) == 1
    path.write_bytes(path.read_bytes().replace(before, after))


def test_another_type_is_named(whole):
    with pytest.raises(ValueError, match=f"{MOMENT}: wanted BF16, found F32"):
        load(whole, model(), {MOMENT: torch.zeros(5, 3, dtype=torch.bfloat16)})


@pytest.mark.parametrize("text", [sealed, json.dumps], ids=["sealed as now", "sealed otherwise"])
def test_a_later_version_is_no_damage(copy, text):
    edit(copy, lambda manifest: manifest.update(version=2), text)
    with pytest.raises(ValueError, match="is of version 2 .* reads version 1: update megatsp") as caught:
        load(copy, model(), {})
    assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "hf/../../secret", "a//b", "./a", "", ".", MANIFEST, "a\\b", "a\nb"]
)
def test_names_that_leave_the_folder_are_refused(copy, name):
    edit(copy, lambda manifest: manifest["files"].update({name: {"bytes": 0, "xxh3_128": ""}}))
    with pytest.raises(ValueError, match="is no plain name of a file in that folder") as caught:
        load(copy, model(), {})
    assert not isinstance(caught.value, Damaged)


def test_links_that_leave_the_folder_are_refused(copy, tmp_path):
    (tmp_path / "secret").write_bytes(b"{}")
    (copy / "hf" / "config.json").unlink()
    (copy / "hf" / "config.json").symlink_to(tmp_path / "secret")
    for look in (check_folder, stored_files):
        with pytest.raises(ValueError, match="is a link to .*/secret, outside the checkpoint"):
            look(copy)
    # A link to the checkpoint itself is no trouble.
    (copy / "hf" / "config.json").unlink()
    (copy / "hf" / "config.json").write_bytes(b"{}")
    (tmp_path / "linked").symlink_to(copy)
    assert stored_files(tmp_path / "linked") == {"hf/config.json": b"{}"}


def test_files_that_the_manifest_does_not_list_are_not_read(copy):
    shutil.copy(copy / SHARD, copy / "model.safetensors")
    (copy / "hf" / "more.json").write_text("{}")
    load(copy, model(), {MOMENT: torch.zeros(5, 3)})
    assert list(stored_files(copy)) == ["hf/config.json"]


@pytest.mark.parametrize(
    "text",
    ["[]", '{"iteration": "3"}', '{"iteration": true}', '{"newer": 1}', '{"best_loss": null}', "[" * 100_000],
)
def test_a_strange_state_is_refused(copy, text):
    (copy / "state.json").write_text(text)
    with pytest.raises(Damaged, match="cannot read state.json"):
        read_state(copy)


@pytest.mark.parametrize(
    "value", [[["a", 1]], [[1, 2], [1, 3]], [[2, 2]], [[5]], -5, 10**40, ["x"], True, None]
)
@pytest.mark.parametrize("name", vars(RunState()))
def test_a_value_of_no_state_is_named(copy, name, value):
    if type(getattr(RunState(), name)) is float and value == -5:
        value = "-5"  # a loss may be below 0
    (copy / "state.json").write_text(json.dumps({"iteration": 3, name: value}))
    with pytest.raises(Damaged, match=f"cannot read state.json: {name}: expected .*, found "):
        read_state(copy)


def test_a_state_of_another_iteration_is_refused(copy, tmp_path):
    replace_in(copy / "state.json", '"iteration": 3', '"iteration": 6')
    relist(copy)
    for look in (read_state, lambda folder: load(folder, model(), {MOMENT: torch.zeros(5, 3)})):
        with pytest.raises(Damaged, match="its state.json is of iteration 6, its name of 3"):
            look(copy)
    assert "is of iteration 6" in verify(copy, False, print)[0]
    assert read_state(copy.rename(tmp_path / "kept")).iteration == 6  # a name that says nothing


@pytest.mark.parametrize(
    ("content", "iteration"),
    [
        (b"12\n", 12), (b"000000000012", 12), (b"\xff\xfe", None), ("\u00b2".encode(), None), (b"-1", None),
        (b"1_0", None), (b"1" * 13, None), (b"9" * 5000, None), (b"", None), (b"release", None),
    ],
)  # fmt: skip
def test_a_pointer_names_an_iteration_or_nothing(tmp_path, content, iteration):
    (tmp_path / LATEST).write_bytes(content)
    assert read_pointer(tmp_path / LATEST) == iteration
    assert read_pointer(tmp_path / "none") is read_pointer(tmp_path) is None
    with pytest.raises(ValueError, match="there is no such checkpoint beside it") as caught:
        latest(tmp_path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("which", ["9" * 5000, "\u00b2", "\u0663", "4"])
def test_a_checkpoint_that_is_not_there_is_named(copy, which):
    assert chosen(copy.parent, "3") == copy
    with pytest.raises(ValueError, match=f"has no checkpoint {which[:24]}.*there: iter_0000003"):
        chosen(copy.parent, which)


def test_a_configuration_builds_and_resolves_nothing(tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    for text in (f"name: !!python/object/apply:os.mkdir ['{trace}']", f"name: !!python/name:os.{trace}"):
        with pytest.raises(ValueError, match="not a configuration in YAML"):
            from_yaml(text)
    assert not trace.exists()
    monkeypatch.setenv("SECRET", "told")
    text = "${oc.env:SECRET}"
    assert from_yaml(f"name: '{text}'").name == text
    assert from_yaml(to_yaml(from_yaml(f"name: '{text}'"))).name == text
