from pathlib import Path

import pytest

from megatsp import cli
from megatsp.data.preprocess.arguments import parse

LEAST = ["--input", "a.jsonl", "--output-prefix", "out/a", "--tokenizer", "byte"]


def test_defaults_and_names_of_outputs() -> None:
    options = parse(LEAST)
    assert options.outputs == {"text": "out/a_text_document"}
    assert (options.append_eod, options.on_error, options.workers, options.partitions) == (
        False,
        "fail",
        1,
        0,
    )
    assert parse([*LEAST, "--json-keys", "a", "b", "--input", "b"]).outputs == {
        "a": "out/a_a_document",
        "b": "out/a_b_document",
    }
    assert parse([*LEAST, "--format", "chat"]).outputs == {"chat": "out/a_chat_document"}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--wrokers", "2"], "unknown option --wrokers; did you mean --workers?"),
        (["--append-eos"], "did you mean --append-eod"),
        (["--dataset", "x"], "either --input or --dataset"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], "either --tokenizer"),
        (["--tokenizer-model", "x"], "--tokenizer-model goes with --tokenizer-type"),
        (["--dataset-split", "x"], "--dataset-split goes with --dataset"),
        (["--chat-template", "x"], "--chat-template goes with --format chat"),
        (["--format", "chat", "--json-keys", "a"], "--json-keys does not go with --format chat"),
        (["--format", "chat", "--append-eod"], "--append-eod does not go with --format chat"),
        (["--format", "chat", "--chat-template", "missing"], "--chat-template missing: No such file"),
        (["--json-keys", "a", "a"], "--json-keys 'a'"),
        (["--json-keys", "a/b"], "--json-keys 'a/b'"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--log-interval", "nan"], "--log-interval nan"),
        (["--output-prefix", "out/"], "beginning of a file's name"),
        (["--on-error", "ignore"], "invalid choice"),
    ],
)
def test_mistakes(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preprocess", *LEAST, *more]) == 2
    assert message in capsys.readouterr().err


def test_help_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["preprocess", "--help"])
    assert "--append-eod" in capsys.readouterr().out
    cli.main(["--help"])
    assert "megatsp preprocess --help" in capsys.readouterr().out


def test_ranks_do_not_preprocess(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="without torchrun"):
        cli._preprocess(LEAST)


def test_a_template_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    options = parse([*LEAST, "--format", "chat", "--chat-template", str(tmp_path / "t.jinja")])
    assert options.chat_template == "{{ messages }}"
