"""A run and its tokenizer: stored with every checkpoint, used from there, and never exchanged unnoticed."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from runs import command, overrides, train_on_ranks, write_corpus
from texts import CORPUS
from tokenizers import models, pre_tokenizers, trainers
from waiting import LIMIT_S

from megatsp.checkpoint import store
from megatsp.compose import compose
from megatsp.data.indexed import IndexedWriter
from megatsp.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from megatsp.training.folder import find_checkpoints
from megatsp.training.generate import main as generate

SHORT = (
    "trainer.train_iters=2",
    "scheduler.lr_warmup_iters=1",
    "trainer.eval_iters=1",
    "model.vocab_size=300",
)


def prepare(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Data written with a tokenizer, and the arguments of a run on it."""
    texts = [text for text in "\n\n".join(CORPUS[:2]).split("\n\n") if text]
    with IndexedWriter(folder / "corpus", tokenizer) as writer:
        for number, text in enumerate(texts):
            writer.add(f"doc{number}", tokenizer.encode(text), len(text.encode()))
    return overrides(folder / "corpus", folder, f"data.tokenizer={folder}/tokenizer", *SHORT)


def words(folder: Path) -> Tokenizer:
    """A tokenizer whose ids have no exact bytes."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<unk>", "</s>"]
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    first = train_bpe(CORPUS[:1], 300, tmp_path / "tokenizer" / "tokenizer.json")
    run = prepare(tmp_path, first)
    train_on_ranks(1, run)
    shutil.rmtree(tmp_path / "tokenizer")
    second = train_bpe(CORPUS[1:], 300, tmp_path / "tokenizer" / "tokenizer.json")
    prepare(tmp_path, second)
    with pytest.raises(Exception, match="was trained with another tokenizer") as caught:
        train_on_ranks(1, [*run, "trainer.train_iters=3"])
    for tokenizer in (first, second):
        assert tokenizer.fingerprint[:12] in str(caught.value)
    # A checkpoint that stores no fingerprint has nothing to compare.
    found = find_checkpoints(compose(run), print)[0]
    state = json.loads((found / "state.json").read_text())
    assert (state.pop("tokenizer"), state.pop("tokenizer_fingerprint")) == (
        f"{tmp_path}/tokenizer",
        first.fingerprint,
    )
    (found / "state.json").write_text(json.dumps(state))
    store.check_tokenizer(found, second)


def test_generate_needs_nothing_but_the_checkpoint(tmp_path):
    tokenizer = train_bpe(CORPUS[:1], 300, tmp_path / "tokenizer" / "tokenizer.json")
    train_on_ranks(1, prepare(tmp_path, tokenizer))
    shutil.rmtree(tmp_path / "tokenizer")
    job = command(
        "generate", str(tmp_path / "run"), "--prompt", "def ", "--tokens", "8", "--temperature", "0"
    )
    printed, errors = job.communicate(timeout=LIMIT_S)
    assert (job.returncode, errors) == (0, "") and printed.startswith("def ")
    # Another one in its place is found out, before any rank starts to work.
    train_bpe(CORPUS[1:], 300, tmp_path / "run/checkpoints/iter_0000002/tokenizer/tokenizer.json")
    with pytest.raises(ValueError, match=r"is damaged: tokenizer/tokenizer\.json, of "):
        generate(tmp_path / "run", "last", "", "", 1, 0.0, 1)


def test_without_exact_bytes_the_loss_alone_is_evaluated(tmp_path):
    tokenizer = words(tmp_path / "tokenizer")
    assert tokenizer.bytes_per_token() is None
    entries = train_on_ranks(1, [*prepare(tmp_path, tokenizer), "trainer.eval_interval=1"])[0]
    evaluations = [entry for entry in entries if "val/lm loss" in entry]
    assert len(evaluations) == 2
    assert all("val/bits-per-byte" not in entry for entry in evaluations)


def test_a_checkpoint_whose_tokenizer_is_damaged_is_refused(tmp_path):
    write_corpus(tmp_path / "corpus")
    train_on_ranks(1, overrides(tmp_path / "corpus", tmp_path, *SHORT))
    found = tmp_path / "run" / "checkpoints" / "iter_0000002"
    assert store.load_tokenizer_of(found, "byte").fingerprint == ByteTokenizer().fingerprint
    (found / "tokenizer" / "megatsp_tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"is damaged: tokenizer/megatsp_tokenizer\.json, .*is missing"):
        store.load_tokenizer_of(found, "byte")
