"""Checkpoints that are not whole, or not what they say: each is refused with what is wrong and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import Made, make, write_tokenizer
from safetensors.torch import load_file, save_file

from megatsp.hf.checkpoint import open_checkpoint
from megatsp.hf.hashes import hashes
from megatsp.hf.source import HFSource

HEAD, NORM = "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One of several files, tied; and one of a single file, untied."""
    folders = tmp_path_factory.mktemp("whole")
    make(Made("tied", "llama", dict(tie_word_embeddings=True), max_shard_size="20KB"), folders / "tied")
    make(Made("untied", "llama"), folders / "untied")
    return folders


@pytest.fixture
def tied(whole, tmp_path):
    return Path(shutil.copytree(whole / "tied", tmp_path / "tied"))


@pytest.fixture
def untied(whole, tmp_path):
    return Path(shutil.copytree(whole / "untied", tmp_path / "untied"))


def refused(folder: Path | str, *messages: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_checkpoint(str(folder))
    for message in messages:
        assert message in str(caught.value)


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def rewrite_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def rewrite_header(path: Path, change) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_nothing_there(tmp_path):
    refused(tmp_path / "no/such/place", "no checkpoint at", "OWNER/NAME")
    refused("owner/not-in-the-cache", "no checkpoint at owner/not-in-the-cache", "Without a network")
    file = tmp_path / "file"
    file.write_text("")
    refused(file, "is a file: give the folder")


def test_no_config(tied):
    (tied / "config.json").rename(tied / "adapter_config.json")
    refused(tied, "is an adapter of another model")
    (tied / "adapter_config.json").unlink()
    refused(tied, "has no config.json", "it holds generation_config.json")
    (tied / "config.json").write_text("{")
    refused(tied, "config.json is not valid JSON")
    (tied / "config.json").write_text("[]")
    refused(tied, "holds no JSON object, but a list")


def test_half_the_files(tied):
    files = sorted(tied.glob("*.safetensors"))
    for path in files[::2]:
        path.unlink()
    refused(tied, f"{len(files[::2])} of {len(files)} files of weights are missing: {files[0].name}")


def test_no_weights_or_pickled_ones(untied):
    (untied / "model.safetensors").rename(untied / "pytorch_model.bin")
    refused(untied, "pickled weights can run code and are not read", "save_pretrained")
    (untied / "pytorch_model.bin").unlink()
    refused(untied, "has no model.safetensors: give a folder of a Hugging Face model")


def test_damaged_headers(untied):
    path = untied / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    refused(
        untied, "model.safetensors is cut off", f"it has {len(content) - 10}", "download or copy it again"
    )
    path.write_bytes(content + b"more")
    refused(untied, "model.safetensors is damaged: by its header")
    path.write_bytes(content[:5])
    refused(untied, "is damaged: no readable header")
    path.write_bytes(content[:8] + b"?" + content[9:])
    refused(untied, "is damaged: no readable header")
    path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    refused(untied, "its header would have 1099511627776 bytes")
    path.write_bytes(content)
    rewrite_header(path, lambda header: header[NORM].pop("shape"))
    refused(untied, "its header is not laid out as one: KeyError 'shape'")
    path.write_bytes(content)
    rewrite_header(path, lambda header: header[NORM].update(shape=[47]))
    refused(untied, f"{NORM}, F32 (47,), has 192 bytes instead of 188")
    path.write_bytes(content)
    rewrite_header(path, lambda header: header[NORM].update(data_offsets=[0, 192]))
    refused(untied, "begins at byte", "what is before it ends at")


def test_tensors_that_are_missing_unexpected_or_of_another_shape(untied):
    def change(tensors):
        del tensors[NORM]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
        tensors[HEAD] = torch.zeros(48, 131)
        for i in range(9):
            tensors[f"model.extra.{i}"] = torch.zeros(1)

    rewrite(untied, change)
    refused(
        untied, f"1 missing: {NORM}", "10 unexpected: model.extra.0", "and 2 more",
        f"1 of another shape: {HEAD} (48, 131) instead of (131, 48)",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_types_that_are_not_read(untied, dtype):
    rewrite(untied, lambda tensors: tensors.update({HEAD: tensors[HEAD].to(dtype)}))
    refused(untied, "1 of a type other than fp32, bf16, fp16 (quantised weights are not read)", HEAD)


def test_quantised(untied):
    rewrite_config(untied, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(untied, str(untied), "quantization_config='gptq'", "unquantised")


def test_an_index_that_does_not_fit(tied):
    path = tied / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = {**index["weight_map"], NORM: files[0]}
    path.write_text(json.dumps({"weight_map": moved}))
    refused(
        tied, "do not fit together: 1 tensors", f"{NORM}: {files[0]} in the index, {files[-1]} in the files"
    )
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], NORM: "../x.safetensors"}}))
    refused(tied, "'../x.safetensors' is not the name of a file beside it")
    path.write_text("{}")
    refused(tied, "it has no weight_map")
    shutil.copy(tied / files[0], tied / "model.safetensors")
    refused(tied, "has model.safetensors and model.safetensors.index.json: remove the one")


def test_a_wrong_hash_beside_it(untied):
    path = untied / "model.safetensors"
    (untied / "SHA256SUMS").write_text(f"{hashes([path])[path]}  model.safetensors\n")
    open_checkpoint(str(untied))
    rewrite(untied, lambda tensors: tensors[NORM].add_(1))
    refused(untied, "1 damaged file", "model.safetensors: sha256 should be", "download or copy again")
    assert open_checkpoint(str(untied), hashes=False)
    (untied / "SHA256SUMS").write_text("nonsense\n")
    refused(untied, "line 1 of", "is not a hash")


def test_every_listed_file_has_its_hash(untied):
    listed = {path.name: found for path, found in hashes(sorted(untied.glob("*.json"))).items()}
    (untied / "SHA256SUMS").write_text("".join(f"{found}  {name}\n" for name, found in listed.items()))
    open_checkpoint(str(untied))
    rewrite_config(untied, rope_theta=5.0)
    refused(untied, "1 damaged file", "config.json: sha256 should be", "after a change on purpose remove")
    (untied / "generation_config.json").unlink()
    refused(untied, "lists generation_config.json, which is not there")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_attention_heads", 0, "has no number above 0 as num_attention_heads"),
        ("num_key_value_heads", -1, "num_key_value_heads=-1 in config.json: expected a number above 0"),
        ("architectures", 5, "architectures=5 in config.json: expected a list of names"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "1e4"}, "rope_theta='1e4': expected a"),
        ("rope_parameters", {"rope_type": ["default"]}, "config.json is damaged: TypeError"),
        ("tie_word_embeddings", None, "tie_word_embeddings=None in config.json: expected true or false"),
    ],
)
def test_strange_values(untied, key, value, message):
    rewrite_config(untied, **{key: value})
    refused(untied, message)


def test_a_wrong_hash_in_a_cache(untied):
    """Of the hub's layout: a link to a blob whose name is its hash."""
    path, blobs = untied / "model.safetensors", untied.parent / "blobs"
    blobs.mkdir()
    blob = blobs / hashes([path])[path]
    path.rename(blob)
    path.symlink_to(blob)
    open_checkpoint(str(untied))
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    refused(untied, "1 damaged file", "sha256 should be")


def test_a_tied_head_that_differs(untied):
    rewrite_config(untied, tie_word_embeddings=True)
    refused(untied, "says tie_word_embeddings, but lm_head.weight is not model.embed_tokens.weight")
    rewrite(untied, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}))
    opened = open_checkpoint(str(untied))
    assert HEAD in opened.dtypes and HEAD not in HFSource(opened).shapes


def test_harmless_tensors_of_old_checkpoints(untied):
    rewrite(untied, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert open_checkpoint(str(untied)).dtype == "fp32"


def test_a_tokenizer_that_is_larger_than_the_embedding(untied):
    write_tokenizer(untied, 131)
    open_checkpoint(str(untied))
    write_tokenizer(untied, 132)
    refused(untied, "its tokenizer has 132 ids, but its embedding 131 rows")


def test_remote_code_is_not_run(untied):
    """Of a family that we know nothing of it is used; of another nothing can be."""
    (untied / "modeling_evil.py").write_text("raise SystemExit('it was run')\n")
    rewrite_config(untied, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    open_checkpoint(str(untied))
    rewrite_config(untied, architectures=["EvilForCausalLM"])
    refused(untied, "architecture EvilForCausalLM", "auto_map")
    sources = Path(__file__).resolve().parents[2] / "megatsp"
    assert not [path for path in sources.rglob("*.py") if "trust_remote_code" in path.read_text()]


def test_the_fingerprint_is_of_content(untied, tied):
    first = open_checkpoint(str(untied)).fingerprint
    assert first != open_checkpoint(str(tied)).fingerprint
    moved = untied.rename(untied.parent / "elsewhere")
    assert open_checkpoint(str(moved)).fingerprint == first
    rewrite(moved, lambda tensors: tensors[HEAD].add_(1))
    assert open_checkpoint(str(moved)).fingerprint != first
