"""Hugging Face's tokenizers: the ids are those of transformers, whatever kind of model the file holds."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from texts import CORPUS, RENDERED, TRICKY
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatsp.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer

CHAT = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", *CHAT]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def llama2() -> tokenizers.Tokenizer:
    """As transformers converted Llama 2: no pre-tokenizer, spaces as U+2581, unknown characters as bytes."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=True)  # for training alone
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*specials, *(f"<0x{i:02X}>" for i in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS[:1], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["pre_tokenizer"] = None
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS[:2], trainer)
    return backend


def wordpiece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS[:2], trainer)
    return backend


KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "byte-level": (byte_level, "<|endoftext|>"),
    "llama2": (llama2, "</s>"),
    "unigram": (unigram, "</s>"),
    "wordpiece": (wordpiece, "[SEP]"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each kind, saved by transformers; the byte-level one has a chat template."""
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("hf")
    for name, (make, eos) in KINDS.items():
        saved = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token=eos)
        if name == "byte-level":
            saved.chat_template = TEMPLATE
        saved.save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(str(folder)) for name, folder in folders.items()}


def copy_of(folder: Path, target: Path, **changes: object) -> Path:
    """The tokenizer.json of a folder with some keys changed, alone in another folder."""
    target.mkdir(parents=True, exist_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (target / "tokenizer.json").write_text(json.dumps(content | changes))
    return target


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_transformers(folders, loaded, name):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folders[name]), loaded[name]
    specials = set(ours.special_tokens.values())
    for text in TRICKY:
        ids = ours.encode(text)
        # transformers is told not to see special tokens; of Unigram, the model itself finds them all the same
        wanted = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if name != "unigram" or not specials & set(wanted) - {0}:
            assert ids == wanted, text
        assert not specials - {ours.special_tokens.get("<unk>"), ours.special_tokens.get("[UNK]")} & set(ids)
        assert ours.encode_rendered(text)[0] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch(TRICKY) == [ours.encode(text) for text in TRICKY]
    assert (ours.vocab_size, ours.eod) == (len(theirs), theirs.eos_token_id)


def test_unigram_cuts_a_special_tokens_text_and_keeps_the_rest(loaded):
    ours = loaded["unigram"]
    assert (
        ours.eod not in ours.encode("the end</s>of it") and ours.eod in ours.encode_rendered("end</s>it")[0]
    )
    assert ours.decode(ours.encode("the end</s>of it")) == "the end</s>of it"
    assert (
        ours.encode("the < end / s > of it") == loaded["unigram"]._backend.encode("the < end / s > of it").ids
    )


def test_bytes_are_exact_where_they_can_be(loaded):
    byte, llama = loaded["byte-level"], loaded["llama2"]
    for text in TRICKY:
        assert b"".join(byte.token_bytes[i] for i in byte.encode(text)) == text.encode()
        assert byte.decode(byte.encode(text)) == text
        normalised = (" " + text if text else "").replace("▁", " ")
        assert b"".join(llama.token_bytes[i] for i in llama.encode(text)) == normalised.encode()
        assert llama.decode(llama.encode(text)) == text.replace("▁", " ")
        assert int(llama.bytes_per_token()[llama.encode(text)].sum()) == len(normalised.encode())
    for name in ("unigram", "wordpiece"):
        assert loaded[name].token_bytes is None and loaded[name].bytes_per_token() is None
    assert byte.bytes_per_token()[byte.eod] == llama.bytes_per_token()[llama.eod] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"]["vocab"].pop("Ġ"),  # a byte short
        lambda content: content["model"].update(end_of_word_suffix="</w>"),
        lambda content: content.update(decoder=None),
        lambda content: content["added_tokens"].append(
            {"id": 500, "content": "<tag>", "special": False, "lstrip": True}
            | dict.fromkeys(("rstrip", "normalized", "single_word"), False)
        ),
    ],
)
def test_bytes_that_are_not_exact_are_not_given(folders, tmp_path, change):
    content = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if i < 259}
    content["post_processor"] = None
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path)).token_bytes is None


def test_added_tokens_that_are_not_special_stand_for_their_text(folders, tmp_path):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {"id": 0, "content": "<|endoftext|>", "special": True} | flags
    plain = {"id": 500, "content": "<tag>é", "special": False} | flags
    tokenizer = load_tokenizer(str(copy_of(folders["byte-level"], tmp_path, added_tokens=[special, plain])))
    text = "a<tag>éb"
    assert 500 in tokenizer.encode(text) and tokenizer.vocab_size == 501
    assert int(tokenizer.bytes_per_token()[tokenizer.encode(text)].sum()) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rendered_text_gives_special_tokens_and_where_ids_begin(loaded):
    tokenizer = loaded["byte-level"]
    ids, starts = tokenizer.encode_rendered(RENDERED)
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert [i for i in ids if i < 3] == [1, 2, 1, 2, 0]
    assert [
        RENDERED[s:].startswith(("<|im", "<|end")) for i, s in zip(ids, starts, strict=True) if i < 3
    ] == [True] * 5
    assert starts[0] == 0 and starts == sorted(starts)
    pieces = [RENDERED[a:b] for a, b in zip(starts, [*starts[1:], len(RENDERED)], strict=True)]
    assert "".join(pieces) == RENDERED
    # Where each id's first byte stands in the text, by the bytes of the ids before it.
    names = {i: text.encode() for text, i in tokenizer.special_tokens.items()}
    character_of = [i for i, character in enumerate(RENDERED) for _ in character.encode()]
    byte = 0
    for i, start in zip(ids, starts, strict=True):
        assert start == character_of[byte]
        byte += len(names.get(i) or tokenizer.token_bytes[i])
    assert byte == len(character_of)


def test_truncation_padding_and_bos_of_the_file_are_off(folders, loaded, tmp_path):
    limit = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    tokenizer = load_tokenizer(
        str(copy_of(folders["byte-level"], tmp_path, truncation=limit, padding=padding))
    )
    assert tokenizer.encode(TRICKY[3]) == loaded["byte-level"].encode(TRICKY[3])
    assert tokenizer.fingerprint == loaded["byte-level"].fingerprint
    assert loaded["llama2"].encode("x")[0] != 1


@pytest.mark.parametrize("name", KINDS)
def test_files_give_the_same_tokenizer_anywhere(folders, loaded, tmp_path, name):
    for file, content in loaded[name].files().items():
        (tmp_path / file).write_bytes(content)
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(spec))
        assert again.fingerprint == loaded[name].fingerprint and again.eod == loaded[name].eod
        assert again.chat_template == loaded[name].chat_template
        assert again.name == str(spec)
    again = pickle.loads(pickle.dumps(loaded[name]))
    assert again.fingerprint == loaded[name].fingerprint and again.encode("a b") == loaded[name].encode("a b")


def test_the_fingerprint_is_of_what_decides_ids(folders, loaded, tmp_path):
    before = loaded["byte-level"].fingerprint
    content = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    (tmp_path / "alone.json").write_text(json.dumps(content, indent=3, sort_keys=True))
    assert (
        load_tokenizer(str(tmp_path / "alone.json")).fingerprint == before
    )  # the same eod without its config
    bos = copy_of(folders["byte-level"], tmp_path / "bos", post_processor=None)
    assert load_tokenizer(str(bos)).fingerprint == before
    model = content["model"] | {"ignore_merges": True}
    assert (
        load_tokenizer(str(copy_of(folders["byte-level"], tmp_path / "m", model=model))).fingerprint != before
    )
    other = copy_of(folders["byte-level"], tmp_path / "eod")
    (other / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    tokenizer = load_tokenizer(str(other))
    assert tokenizer.eod == 2 and tokenizer.fingerprint != before
    assert len({t.fingerprint for t in loaded.values()}) == len(loaded)


def test_chat_templates(folders, loaded, tmp_path):
    assert loaded["byte-level"].chat_template == TEMPLATE and loaded["llama2"].chat_template is None
    folder = copy_of(folders["byte-level"], tmp_path)
    for template, wanted in [
        ("one", "one"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}], None),
    ]:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert load_tokenizer(str(folder)).chat_template == wanted
    (folder / "chat_template.jinja").write_text("é")
    assert load_tokenizer(str(folder)).chat_template == "é"


def test_tokens_that_only_the_config_knows_are_added(folders, loaded, tmp_path):
    folder = copy_of(folders["byte-level"], tmp_path)
    extra = {
        "500": {"content": "<|new|>", "special": True},
        "0": {"content": "<|endoftext|>", "special": True},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": extra}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.encode_rendered("a<|new|>")[0][-1] == 500 == tokenizer.vocab_size - 1
    assert 500 not in tokenizer.encode("a<|new|>")
    assert tokenizer.fingerprint != loaded["byte-level"].fingerprint
    extra["600"] = {"content": "<|far|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": extra}))
    with pytest.raises(
        ValueError, match=r"gives '<\|far\|>' the id 600, but by tokenizer.json it would be 501"
    ):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"model": {"type": "Alien", "vocab": {}}}, None, "is not a readable tokenizer.json: "),
        ({"model": None}, None, "is not a readable tokenizer.json: it has no model with a vocabulary"),
        ({"added_tokens": []}, None, r"no end-of-document token: .*its special tokens: none"),
        ({}, '{"eos_token": "</s>"}', "eos_token of .* is '</s>', which is not in tokenizer.json"),
        ({}, '{"added_tokens_decoder": {"7": 1}}', "is not laid out as a tokenizer's: TypeError"),
        ({}, "[]", "tokenizer_config.json of .* is no JSON object, but a list"),
        ({}, "{", "tokenizer_config.json of .* is not valid JSON"),
    ],
)
def test_what_cannot_be_used_is_named(folders, tmp_path, changes, config, message):
    folder = copy_of(folders["byte-level"], tmp_path, **changes)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(folder))


def test_special_tokens_are_listed_where_none_ends_a_document(folders):
    with pytest.raises(
        ValueError, match=r"no end-of-document token.*special tokens: \[UNK\], \[CLS\], \[SEP\]"
    ):
        HuggingFaceTokenizer({"tokenizer.json": (folders["wordpiece"] / "tokenizer.json").read_bytes()}, "w")


@pytest.mark.parametrize("name", KINDS)
def test_surrogates_are_refused(loaded, name):
    for encode in (
        loaded[name].encode,
        loaded[name].encode_rendered,
        lambda t: loaded[name].encode_batch([t]),
    ):
        with pytest.raises(ValueError, match=r"character 1 of the text is the lone surrogate U\+D800"):
            encode("a\ud800")
