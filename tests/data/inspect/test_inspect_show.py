"""Samples as text: which tokens are marked as trained, where documents meet, what a terminal is spared."""

from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import CHATML, LLAMA2, save_tokenizer

from megatsp.data.dataset import Piece, Sample
from megatsp.data.inspect.show import BRACKETS, COLOURS, Part, Speller, parts, spans
from megatsp.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

SPELLER = Speller(ByteTokenizer())


def part(ids: list[int], trained: list[bool]) -> Part:
    return Part(Piece(0, 0, len(ids)), np.array(ids), np.array(trained))


def shown(found: list[Part], speller: Speller = SPELLER) -> list[list[tuple[bool, str]]]:
    return [list(spans(part, speller)) for part in found]


def sample(tokens: str, labels: str, mask: str) -> Sample:
    def ids(text: str) -> np.ndarray:
        return np.array([256 if c == "$" else ord(c) for c in text])

    return Sample(ids(tokens), ids(labels), np.array([float(c) for c in mask], np.float32), None)


def test_in_a_stream_labels_cross_documents() -> None:
    stream = sample("b$cd$ef", "$cd$efg", "1111111")
    pieces = [Piece(3, 5, 2), Piece(1, 0, 3), Piece(2, 0, 2)]
    eod = "<|endoftext|>"
    assert shown(parts(stream, pieces, is_stream=True)) == [
        [(False, "b"), (True, eod)],
        [(True, f"cd{eod}")],
        [(True, "efg")],
    ]
    held_apart = stream._replace(mask=np.array([1, 0, 1, 1, 0, 1, 1], np.float32))
    assert shown(parts(held_apart, pieces, is_stream=True)) == [
        [(False, "b"), (True, eod)],
        [(False, "c"), (True, f"d{eod}")],
        [(False, "e"), (True, "fg")],
    ]


def test_the_last_label_of_a_stream_may_begin_another_document() -> None:
    found = parts(sample("b$", "$c", "11"), [Piece(0, 1, 2)], is_stream=True, ends_document=True)
    assert found[1].piece is None
    assert shown(found) == [[(False, "b"), (True, "<|endoftext|>")], [(True, "c")]]


def test_packed_documents_end_with_a_label_and_padding_is_no_part() -> None:
    packed = sample("abde$$", "bcef$$", "011100")
    found = parts(packed, [Piece(0, 0, 2), Piece(1, 0, 2)], is_stream=False)
    assert shown(found) == [[(False, "ab"), (True, "c")], [(False, "d"), (True, "ef")]]
    assert sum(int(p.trained.sum()) for p in found) == packed.mask.sum()


def test_characters_of_several_tokens_are_whole() -> None:
    ids = list("é世🎉".encode())
    assert list(spans(part(ids, [False] + [True] * 8), SPELLER)) == [(False, "é"), (True, "世🎉")]
    assert list(spans(part(ids, [True] * 6 + [False] * 3), SPELLER)) == [(True, "é世🎉")]
    assert list(spans(part(ids[1:], [False] + [True] * 7), SPELLER)) == [(False, "\ufffd"), (True, "世🎉")]
    assert list(spans(part(ids[:-1], [True] * 8), SPELLER)) == [(True, "é世\ufffd")]
    literal = list("a\ufffdb".encode())
    assert list(spans(part(literal, [True] * 4 + [False]), SPELLER)) == [(True, "a\ufffd"), (False, "b")]


def test_nothing_commands_the_terminal() -> None:
    ids = np.frombuffer("a\x1b[31m\tb\r\n\x07\x7f\u009b".encode(), np.uint8).astype(np.int64)
    assert SPELLER.text(ids) == "a␛[31m\tb␍\n␇␡\ufffd"


def test_ids_that_the_tokenizer_does_not_have_are_numbers() -> None:
    assert SPELLER.text(np.array([97, 300, 301, 256, 98])) == "a<|id 300|><|id 301|><|endoftext|>b"
    assert SPELLER.text(np.array([], np.int64)) == ""


@pytest.mark.parametrize("template, sentencepiece", [(CHATML, False), (LLAMA2, True)])
def test_blanks_between_spans_are_kept(tmp_path: Path, template: str, sentencepiece: bool) -> None:
    tokenizer: Tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, template, sentencepiece)))
    speller = Speller(tokenizer)
    ids = np.array(tokenizer.encode("Hello there, a helpful assistant 🎉 a"))
    for cut in range(1, len(ids)):
        trained = np.arange(len(ids)) < cut
        text = "".join(text for _, text in spans(Part(None, ids, trained), speller))
        assert text.lstrip() == "Hello there, a helpful assistant 🎉 a"


def test_colours_are_repeated_on_every_line() -> None:
    assert COLOURS.paint("a\n\nb", COLOURS.trained) == "\x1b[32ma\x1b[0m\n\n\x1b[32mb\x1b[0m"
    assert BRACKETS.paint("a\nb", BRACKETS.trained) == "⟦a\nb⟧"
    assert BRACKETS.paint("a", BRACKETS.untrained) == "a"
