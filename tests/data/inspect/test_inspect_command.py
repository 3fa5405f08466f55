"""`megatsp data inspect` on small corpora: what it shows is what training reads."""

import sys
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import CHATML, save_tokenizer

from megatsp import cli
from megatsp.compose import compose
from megatsp.data.indexed import IndexedWriter
from megatsp.data.inspect import command
from megatsp.data.sft import Renderer
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import ByteTokenizer, load_tokenizer

EOD = "<|endoftext|>"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of bytes, in a folder that becomes the current one."""
    monkeypatch.chdir(tmp_path)
    with IndexedWriter(tmp_path / "text", ByteTokenizer()) as writer:
        for i in range(20):
            content = f"{i} is ünïcode 🎉 ".encode() * (1 + i % 3)
            writer.add(f"file{i // 10}.txt", list(content), len(content))
    return tmp_path / "text"


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a corpus of conversations."""
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path / "tokenizer", CHATML)))
    renderer = Renderer(tokenizer, "chat")
    with IndexedWriter(tmp_path / "chat", tokenizer, roles=True) as writer:
        for i in range(12):
            contents = (f"question {i}", f"first {i} 🎉", "and", "last")
            roles = ("user", "assistant") * 2
            messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
            found = renderer.render({"messages": messages})
            writer.add("chat.jsonl", found.ids, found.num_bytes, roles=found.roles, eod=False)
    return [
        f"data.path={tmp_path / 'chat'}", f"data.tokenizer={tmp_path / 'tokenizer'}", "model.vocab_size=400",
        "trainer.seq_length=160", "data.packing=greedy",
    ]  # fmt: skip


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["data", "inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_samples_are_those_of_training_in_its_order(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"data.path={text}", "trainer.seq_length=50"]
    out = shown(capsys, *overrides, "--samples", "3", "--at", "4")
    blend = load_splits(compose(overrides), ByteTokenizer()).train
    blocks = out.split("=== sample ")[1:]
    assert [block.split(":")[0] for block in blocks] == ["4", "5", "6"]
    for block, draw in zip(blocks, blend.draw(4, 3), strict=True):
        sample = blend.sample(draw)
        assert f"epoch {draw.epoch}, its sample {draw.sample} of {len(blend)}" in block
        assert "50 positions, 50 trained, 0 padding" in block
        for name in blend.names(draw):
            assert name in block
        ids = [*sample.tokens.tolist(), int(sample.labels[-1])]
        expected = b"".join(EOD.encode() if i == 256 else bytes([i]) for i in ids).decode(errors="replace")
        lines = block.split("\n\n")[0].split("\n")[1:]
        found = "".join(line for line in lines if not line.startswith("--- "))
        found = found.replace("⟦", "").replace("⟧", "")
        assert found.strip("\ufffd") == expected.strip("\ufffd")  # of characters that the sample's ends cut


def test_the_assistants_turns_alone_are_marked(chat: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, *chat, "--samples", "1")
    assert out.startswith("⟦in brackets⟧: labels that are trained\n")
    sample = out.split("=== sample ")[1].split("measured on")[0]
    assert "chat.jsonl document" in sample
    assert "<|im_start|>assistant\n⟦first" in sample
    user = "<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n"
    assert f"🎉<|im_end|>⟧\n{user}⟦last<|im_end|>⟧\n" in sample
    assert "--- padding: " in sample
    last = shown(capsys, *chat, "data.loss_on=last", "--samples", "1")
    assert "⟦first" not in last and "⟦last<|im_end|>⟧" in last


def test_statistics_say_what_the_run_reads(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = f"data.path=[3,{text},1,{text}]"
    out = shown(
        capsys, sources, "trainer.seq_length=50", "data.packing=pad", "data.long_documents=truncate",
        "trainer.train_iters=10", "trainer.global_batch_size=8", "--samples", "0",
        "parallel=tsp", "parallel.tsp=4",
    )  # fmt: skip
    assert "=== sample" not in out
    assert f"{text}: weight 0.75\n" in out and f"{text}: weight 0.25\n" in out
    assert "the run reads 60 samples of it: 3.16 epochs" in out  # of 19, one is held out
    assert "the run reads 20 samples of it: 1.05 epochs" in out
    assert "19 documents with " in out and "truncated" in out
    sizes = np.array([len(f"{i} is ünïcode 🎉 ".encode()) * (1 + i % 3) + 1 for i in range(20)])
    assert f"tokens of its 20 documents, of all splits: min {sizes.min()}," in out
    assert f"mean {sizes.mean():.1f}," in out and f"max {sizes.max()}\n" in out
    assert "measured on 38 samples, 0 to 37:" in out
    assert "documents in a sample: min 1, mean 1.0, max 1" in out


def test_an_evaluation_has_its_own_samples(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"data.path={text}", "data.valid_fraction=0.5", "trainer.seq_length=20"]
    out = shown(capsys, *overrides, "--split", "valid", "--samples", "100")
    blend = load_splits(compose(overrides), ByteTokenizer()).valid
    assert blend is not None
    evaluated = blend.spread(compose(overrides).trainer.eval_iters * 8)
    assert out.count("=== sample ") == len(evaluated)
    assert f"an evaluation reads {len(evaluated)} samples of it" in out
    assert cli.main(["data", "inspect", *overrides, "--split", "valid", "--at", "100"]) == 2
    message = f"--at 100: an evaluation reads the samples 0 to {len(evaluated) - 1}"
    assert message in capsys.readouterr().err


def test_the_histogram_is_in_the_output_folder_or_where_it_is_wanted(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"data.path={text}", "trainer.seq_length=50", "output_dir=o", "name=n", "--samples", "0"]
    assert shown(capsys, *overrides).endswith("lengths of documents: o/n-data.png\n")
    assert Path("o/n-data.png").read_bytes().startswith(b"\x89PNG")
    shown(capsys, *overrides, "--plot", "p/q.png")
    assert Path("p/q.png").read_bytes().startswith(b"\x89PNG")


def test_colours_are_for_terminals(text: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    overrides = [f"data.path={text}", "trainer.seq_length=50", "--samples", "1"]
    assert "\x1b[" not in shown(capsys, *overrides)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    coloured = shown(capsys, *overrides)
    assert "\x1b[32m" in coloured and "⟦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in shown(capsys, *overrides)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspekt"], "unknown command data inspekt; did you mean inspect?"),
        (["inspect", "--samples", "-1"], "--samples -1: must be at least 0"),
        (["inspect", "--at", "-1"], "--at -1: must be at least 0"),
        (["inspect", "--plot", "x.jpg"], "--plot x.jpg: give a file that ends with .png"),
        (["inspect", "--split", "tset"], "argument --split: invalid choice: 'tset'"),
        (
            ["inspect", "data.path=text", "trainer.seq_length=8", "--split=test"],
            "there is no test split: set data.test_fraction",
        ),
        (["inspect", "trainer.seq_len=1"], "unknown key trainer.seq_len"),
        (["inspect", "data.path=nowhere"], "no data at nowhere"),
    ],
)
def test_mistakes_are_one_message(
    text: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    assert capsys.readouterr().out == command.USAGE
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "inspect", "--help"])
    assert ended.value.code == 0 and "--split {train,valid,test}" in capsys.readouterr().out
