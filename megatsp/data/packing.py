"""Documents to samples that hold them apart: first cut to pieces, then pieces put together.

A piece is a run of a document's tokens that are inputs; each has the token after it as its label, so the last
token of a document is a label alone and no label crosses a border. A document of n tokens has n - 1 inputs.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

# A run of one document's inputs: document, its first input's place in the document, inputs.
PIECE = np.dtype([("document", "<i8"), ("offset", "<i8"), ("length", "<i4")])
WINDOW = 1 << 18  # pieces that best_fit looks at together: bounds its memory, 20 bytes each and a little

Group = np.ndarray  # indices of the pieces of one sample, ascending


def cut(
    documents: np.ndarray, sizes: np.ndarray, seq_length: int, long_documents: str
) -> tuple[np.ndarray, int, int]:
    """The pieces of documents, in order: PIECE [n], how many documents were truncated, how many dropped.

    Args:
        documents, sizes: int64 [N], ids and tokens; those of fewer than 2 tokens have no input, and no piece.
        seq_length: T, the most inputs of a piece.
        long_documents: more than T inputs: split makes several pieces, truncate one, drop none.
    """
    inputs = np.maximum(sizes - 1, 0)
    is_long = inputs > seq_length
    truncated = dropped = 0
    if long_documents == "truncate":
        truncated = int(is_long.sum())
        inputs = np.minimum(inputs, seq_length)
    elif long_documents == "drop":
        dropped = int(is_long.sum())
        inputs = np.where(is_long, 0, inputs)
    counts = -(-inputs // seq_length)
    pieces = np.empty(int(counts.sum()), PIECE)
    owner = np.repeat(np.arange(len(documents)), counts)
    place = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its document
    pieces["document"] = documents[owner]
    pieces["offset"] = place * seq_length
    pieces["length"] = np.minimum(inputs[owner] - place * seq_length, seq_length)
    return pieces, truncated, dropped


def pack(
    chunks: Iterator[np.ndarray], seq_length: int, packing: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces to samples of at most seq_length inputs.

    Args:
        chunks: PIECE arrays, in the order of the pieces.
        packing: greedy (a piece that does not fit begins the next sample), best_fit (best-fit decreasing
            among WINDOW pieces; a sample keeps the order of its pieces) or pad (one piece a sample).
    Yields:
        pieces PIECE [n], sample after sample, and the pieces of each sample, int64 [samples].
    """
    if packing == "pad":
        for chunk in chunks:
            yield chunk, np.ones(len(chunk), np.int64)
    elif packing == "greedy":
        yield from _greedy(chunks, seq_length)
    else:
        assert packing == "best_fit"
        for window in _windows(chunks):
            groups = best_fit(window["length"], seq_length)
            yield window[np.concatenate(groups)], np.array([len(group) for group in groups])


def _greedy(chunks: Iterator[np.ndarray], seq_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    pending = np.empty(0, PIECE)  # of the sample that is not full yet
    for chunk in chunks:
        pieces = np.concatenate([pending, chunk])
        ends = np.cumsum(pieces["length"], dtype=np.int64).tolist()
        starts, begin, filled = [0], 0, 0
        while (stop := bisect_right(ends, filled + seq_length, lo=begin)) < len(pieces):
            starts.append(begin := stop)
            filled = ends[begin - 1]
        if begin:
            yield pieces[:begin], np.diff(starts)
        pending = pieces[begin:]
    if len(pending):
        yield pending, np.array([len(pending)])


def _windows(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    pending = np.empty(0, PIECE)
    for chunk in chunks:
        pending = np.concatenate([pending, chunk])
        while len(pending) >= WINDOW:
            yield pending[:WINDOW]
            pending = pending[WINDOW:]
    if len(pending):
        yield pending


def best_fit(lengths: np.ndarray, capacity: int) -> list[Group]:
    """Best-fit decreasing: longest first, each to the fullest sample that still has room for it.

    Equally long pieces, and equally full samples, are moved together, so that the time grows with the number
    of distinct lengths.

    Args:
        lengths: [n], from 1 to capacity.
    Returns:
        each sample's pieces; the samples are in the order of their first pieces.
    Source: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830, section 3.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    groups: list[list[int]] = []
    open_groups: dict[int, list[int]] = {}  # by room that is left
    rooms: list[int] = []  # the keys, ascending

    def put_back(room: int, members: list[int]) -> None:
        if room in open_groups:
            open_groups[room] += members
        elif room and members:
            insort(rooms, room)
            open_groups[room] = members

    borders = [0, *(np.flatnonzero(np.diff(lengths[order])) + 1).tolist(), len(order)]
    for begin, end in pairwise(borders):
        length, waiting = int(lengths[order[begin]]), order[begin:end].tolist()
        while waiting:
            i = bisect_left(rooms, length)
            if i == len(rooms):  # nothing has room: new samples, as many as these pieces need
                room = capacity
                taken = list(range(len(groups), len(groups) - (-len(waiting) // (room // length))))
                groups += [[] for _ in taken]
            else:
                room = rooms[i]
                found = open_groups[room]
                needed = -(-len(waiting) // (room // length))
                taken, rest = found[:needed], found[needed:]
                if rest:
                    open_groups[room] = rest
                else:
                    del open_groups[room]
                    rooms.pop(i)
            each = room // length  # the fullest sample stays the fullest: it takes as many as it can
            for j, group in enumerate(taken):
                groups[group] += waiting[j * each : (j + 1) * each]
            last = min(len(waiting) - (len(taken) - 1) * each, each)
            put_back(room - each * length, taken[:-1])
            put_back(room - last * length, taken[-1:])
            waiting = waiting[len(taken) * each :]
    for members in groups:
        members.sort()
    groups.sort()  # by their first pieces, which differ
    return [np.array(members) for members in groups]
