"""A sample as text: which tokens are trained, where documents meet, how much is padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatsp.data.blend import Blend, Draw
from megatsp.data.dataset import Piece, Sample
from megatsp.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# Data must not command the terminal: C0 but tab and newline as their pictures, C1 as a replacement.
CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
CONTROLS |= {127: 0x2421} | dict.fromkeys(range(128, 160), ord(REPLACEMENT))


@dataclass(frozen=True)
class Style:
    """What is written around trained labels, around other tokens and around markers, line by line or once."""

    trained: tuple[str, str]
    untrained: tuple[str, str]
    marker: tuple[str, str]
    by_line: bool
    legend: str

    def paint(self, text: str, around: tuple[str, str]) -> str:
        """The text between the two; where a pager would forget a colour at the line's end, every line."""
        if not self.by_line:
            return f"{around[0]}{text}{around[1]}"
        return "\n".join(f"{around[0]}{line}{around[1]}" if line else "" for line in text.split("\n"))


RESET = "\x1b[0m"
COLOURS = Style(
    ("\x1b[32m", RESET), ("\x1b[33m", RESET), ("\x1b[36m", RESET), True,
    "\x1b[32mgreen\x1b[0m: labels that are trained; \x1b[33myellow\x1b[0m: tokens that are not",
)  # fmt: skip
BRACKETS = Style(("⟦", "⟧"), ("", ""), ("", ""), False, "⟦in brackets⟧: labels that are trained")


@dataclass(frozen=True)
class Part:
    """A run of tokens of one document. piece: None for the last label, if it begins another document."""

    piece: Piece | None
    ids: np.ndarray
    trained: np.ndarray  # bool: whether the token is a label that is trained


def parts(
    sample: Sample, pieces: Sequence[Piece], is_stream: bool, ends_document: bool = False
) -> list[Part]:
    """A sample's tokens by document, each with what it is as a label.

    The first token of a sample, and of a document that is held apart, is never a label. A document that is
    held apart has its last token as a label alone; of a stream the sample's last label is such a token.

    Args:
        ends_document: the last piece ends its document, so that a stream's last label begins the next.
    """
    trained = sample.mask > 0
    found, stop = [], 0
    for piece in pieces:
        start, stop = stop, stop + piece.length
        own, first = trained[start:stop], is_stream and start > 0 and trained[start - 1]
        ids, is_trained = sample.tokens[start:stop], np.concatenate([[first], own[:-1]])
        if not is_stream or (stop == len(trained) and not ends_document):
            ids = np.append(ids, sample.labels[stop - 1])
            is_trained = np.append(is_trained, own[-1])
        found.append(Part(piece, ids, is_trained))
    if is_stream and ends_document:
        found.append(Part(None, sample.labels[-1:], trained[-1:]))
    return found


class Speller:
    """Text of runs of ids, in which special tokens are spelled and nothing commands a terminal."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i: text for text, i in tokenizer.special_tokens.items()}
        # Tokenizers that mark a word's begin drop the blank of the first one: so let it not be the first.
        self._anchor = tokenizer.encode("a")
        self._anchor_text = tokenizer.decode(self._anchor)

    def text(self, ids: np.ndarray) -> str:
        """The run's text; what is no whole character in it becomes U+FFFD."""
        apart = np.isin(ids, list(self._special)) | (ids >= self._tokenizer.vocab_size)
        borders = np.flatnonzero(apart[1:] | apart[:-1]) + 1
        return "".join(map(self._run, np.split(ids, borders))).translate(CONTROLS)

    def _run(self, run: np.ndarray) -> str:
        ids = [int(i) for i in run]
        if not ids:
            return ""
        if ids[0] in self._special:
            return self._special[ids[0]]
        if ids[0] >= self._tokenizer.vocab_size:
            return f"<|id {ids[0]}|>"
        anchored = self._tokenizer.decode([*self._anchor, *ids])
        if self._anchor_text and anchored.startswith(self._anchor_text):
            return anchored[len(self._anchor_text) :]
        return self._tokenizer.decode(ids)


def spans(part: Part, speller: Speller) -> Iterator[tuple[bool, str]]:
    """The part's text by whether it is trained; a character of several tokens counts as its first."""
    borders = [0, *(np.flatnonzero(np.diff(part.trained)) + 1).tolist(), len(part.ids)]
    start = 0
    for begin, stop in pairwise(borders):
        if start >= stop:  # all of it went to the span before
            continue
        text = speller.text(part.ids[start:stop])
        if text.endswith(REPLACEMENT):
            for later in range(stop + 1, min(stop + 3, len(part.ids)) + 1):
                whole = speller.text(part.ids[start:later])
                if whole.count(REPLACEMENT) < text.count(REPLACEMENT):
                    stop, text = later, whole
                    break
        yield bool(part.trained[begin]), text
        start = stop


def show_sample(
    blend: Blend, draw: Draw, place: int, is_stream: bool, speller: Speller, style: Style
) -> Iterator[str]:
    """Lines about one sample, and its text.

    Args:
        place: in the order of consumption.
        is_stream: the packing is concat.
    """
    source = blend.sources[draw.source]
    sample, pieces = blend.sample(draw), source.samples.pieces(draw.sample)
    corpus, positions = source.samples.corpus, len(sample.mask)
    num_padding = positions - sum(piece.length for piece in pieces)
    sizes = corpus.sizes(np.array([piece.document for piece in pieces], dtype=np.int64))
    ends = is_stream and pieces[-1].offset + pieces[-1].length == sizes[-1]
    yield style.paint(
        f"=== sample {place}: {source.name}, epoch {draw.epoch}, its sample {draw.sample} of "
        f"{len(source.samples)}; {positions} positions, {int(sample.mask.sum())} trained, {num_padding} "
        "padding ===",
        style.marker,
    )
    for i, part in enumerate(parts(sample, pieces, is_stream, bool(ends))):
        if part.piece is None:
            marker = "the last label, of the next document"
        else:
            document, offset, _ = part.piece
            marker = (
                f"{i + 1}/{len(pieces)}: {corpus.name(document)} (document {document} of the source), tokens "
                f"{offset} to {offset + len(part.ids) - 1} of {sizes[i]}"
            )
        yield style.paint(f"--- {marker} ---", style.marker)
        yield "".join(
            style.paint(text, style.trained if trained else style.untrained)
            for trained, text in spans(part, speller)
        )
    if num_padding:
        yield style.paint(f"--- padding: {num_padding} positions ---", style.marker)
