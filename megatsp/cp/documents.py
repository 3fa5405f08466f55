"""Which tokens of a batch see each other, where samples are packed with documents that lie apart.

A token sees the keys of its own document, up to itself. A rank's tokens lie in the order of the
sequence, so those of a document follow one another there too: among a rank's own tokens every document
is a causal square, across its two chunks if it is in both. Other ranks' keys before a chunk belong, as
far as the chunk sees them, to the one document that it begins with: so of every chunk only the tokens
up to that document's end meet them. All of this is known on the host once a batch, and nothing
is ever of T x T elements.
"""

from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from megatsp.tsp.partition import take_local


class Square(NamedTuple):
    """Tokens of consecutive samples that see each other causally: one document's of each sample."""

    samples: slice
    tokens: slice


class Visit(NamedTuple):
    """Of consecutive samples the local queries [rows], which see the arrived keys [columns] wholly."""

    samples: slice
    rows: slice
    columns: slice


class Reach(NamedTuple):
    """Of the document that a chunk begins with: its tokens in the chunk, and the position of its first."""

    tokens: int
    first: int


class PackedTokens:
    """Tokens in the order of the sequence, and where each one's document begins.

    first: int64 [B, t] on the host, non-decreasing along t.
    """

    def __init__(self, first: Tensor, device: torch.device) -> None:
        self._host, self._device = first, device

    @cached_property
    def first(self) -> Tensor:
        """The same, int64 [B, t], on the device; the host waits for nothing."""
        if self._device.type == "cuda":
            return self._host.pin_memory().to(self._device, non_blocking=True)
        return self._host

    @cached_property
    def squares(self) -> list[Square]:
        """Causal squares that hold every token once."""
        starts = [[0] for _ in self._host]
        for sample, token in (self._host.diff(dim=1) != 0).nonzero().tolist():
            starts[sample].append(token + 1)
        length = self._host.shape[1]
        by_sample = [[range(*ends) for ends in pairwise([*of_sample, length])] for of_sample in starts]
        return [Square(samples, _slice(tokens)) for samples, tokens in _batched(by_sample)]


class Documents:
    """The documents of a batch as rank `rank` of the `size` that share its sequence meets them.

    first: int64 [B, T] of the whole sequence, on the host: for each position that of its document's
        first token.

    Raises:
        ValueError: `first` is on a device, or no such positions.
    """

    def __init__(self, first: Tensor, rank: int, size: int, device: torch.device) -> None:
        _check(first)
        self._first, self._rank, self._size, self._device = first, rank, size, device
        self._own = take_local(first, rank, size)
        self.own = PackedTokens(self._own, device)
        self._visits: dict[tuple[int, int], list[Visit]] = {}

    @cached_property
    def whole(self) -> PackedTokens:
        """Of the whole sequence."""
        return PackedTokens(self._first, self._device)

    @cached_property
    def _reaches(self) -> list[tuple[Reach, Reach]]:
        """By sample, of its low and of its high chunk."""
        chunks = self._own.unflatten(1, (2, -1))  # [B, 2, T/S/2]
        counts = (chunks == chunks[..., :1]).sum(-1).tolist()
        firsts = chunks[..., 0].tolist()
        return [
            (Reach(counts[i][0], firsts[i][0]), Reach(counts[i][1], firsts[i][1])) for i in range(len(counts))
        ]

    def visits(self, begin: int, shards: int) -> list[Visit]:
        """As `visits_of`, of this batch."""
        if (begin, shards) not in self._visits:
            chunk = self._own.shape[1] // 2
            self._visits[begin, shards] = visits_of(
                self._reaches, chunk, self._rank, self._size, begin, shards
            )
        return self._visits[begin, shards]


def visits_of(
    reaches: Sequence[tuple[Reach, Reach]], chunk: int, rank: int, size: int, begin: int, shards: int
) -> list[Visit]:
    """Which queries of `rank` see which keys of the ranks begin .. begin + shards - 1.

    reaches: by sample, of the low and of the high chunk. chunk: tokens of each. size: ranks of the
        sequence.
    Returns visits whose columns, in the order of the sequence, are disjoint within a sample. The rank's own
    keys may be among those that arrive; no visit has them.
    """
    low, high = rank * chunk, (2 * size - 1 - rank) * chunk
    # Where the arrived keys lie in the sequence: their ranks' low chunks, then their high ones.
    spans = (
        range(begin * chunk, (begin + shards) * chunk),
        range((2 * size - begin - shards) * chunk, (2 * size - begin) * chunk),
    )
    by_sample = []
    for of_low, of_high in reaches:
        seen: dict[range, range] = {}  # columns to rows
        before = range(of_high.first, low), range(max(of_high.first, low + chunk), high)
        for start, reach, positions in (
            (0, of_low, (range(of_low.first, low),)),
            (chunk, of_high, before),
        ):
            rows = range(start, start + reach.tokens)
            for columns in _columns(positions, spans):
                # Both chunks see the same keys: then they and all between are of one document.
                seen[columns] = range(seen[columns].start, rows.stop) if columns in seen else rows
        by_sample.append([(rows, columns) for columns, rows in seen.items()])
    return [Visit(samples, _slice(rows), _slice(columns)) for samples, (rows, columns) in _batched(by_sample)]


def _columns(positions: Sequence[range], spans: Sequence[range]) -> list[range]:
    """The places of ascending `positions` in what lies at `spans`, one after another."""
    found: list[range] = []
    for wanted in positions:
        begin = 0
        for span in spans:
            start, stop = max(wanted.start, span.start), min(wanted.stop, span.stop)
            if start < stop:
                columns = range(begin + start - span.start, begin + stop - span.start)
                if found and found[-1].stop == columns.start:
                    columns = range(found.pop().start, columns.stop)
                found.append(columns)
            begin += len(span)
    return found


Item = TypeVar("Item", bound=Hashable)


def _batched(by_sample: Sequence[Sequence[Item]]) -> list[tuple[slice, Item]]:
    """The items of every sample; equal ones of consecutive samples are one."""
    found: list[tuple[slice, Item]] = []
    latest: dict[Item, int] = {}
    for sample, items in enumerate(by_sample):
        for item in items:
            i = latest.get(item)
            if i is not None and found[i][0].stop == sample:
                found[i] = slice(found[i][0].start, sample + 1), item
            else:
                latest[item] = len(found)
                found.append((slice(sample, sample + 1), item))
    return found


def _slice(places: range) -> slice:
    return slice(places.start, places.stop)


def _check(first: Tensor) -> None:
    if first.device.type != "cpu" or first.dtype != torch.int64 or first.dim() != 2:
        raise ValueError(
            "first must be int64 [B, T] on the CPU, of the whole sequence; got "
            f"{first.dtype} {tuple(first.shape)} on {first.device}"
        )
    at = torch.arange(first.shape[1])
    wrong = (first < 0) | (first > at)
    if not wrong.any():
        wrong = first.gather(1, first) != first  # its document would begin elsewhere
        wrong[:, 1:] |= first.diff(dim=1) < 0
    if wrong.any():
        sample, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            "first must give the position of the first token of each token's document, and a document's "
            f"tokens follow one another; sample {sample} has {first[sample, token]} at token {token}"
        )
