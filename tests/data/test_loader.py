from pathlib import Path

import pytest
import torch
from corpora import some_sizes, splits, write
from distributed import run_distributed
from waiting import wait_until

from megatsp.axes import Axes
from megatsp.data.blend import Blend
from megatsp.data.loader import HostBatch, Loader, Share, next_draws, next_runs, read_batch
from megatsp.schema import DataConfig, ParallelConfig

T = 48
GLOBAL = 12  # samples of a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "a", some_sizes(80), roles=True)
    write(folder / "b", some_sizes(30, seed=1), roles=True)
    return folder


def blend(folder: Path, **more) -> Blend:
    sources = ["0.7", f"{folder}/a", "0.3", f"{folder}/b"]
    return splits(sources, seq_length=T, **{"packing": "best_fit", **more}).train


def take(loader: Loader, count: int) -> list[HostBatch]:
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize("micro_batch_size, dp_size", [(1, 1), (2, 3), (3, 2), (4, 3), (1, 12), (12, 1)])
def test_ranks_share_a_global_batch_that_does_not_depend_on_them(micro_batch_size, dp_size):
    shares = [Share(GLOBAL, micro_batch_size, rank, dp_size, ((0, T),)) for rank in range(dp_size)]
    parts = [share.micro_batches(range(GLOBAL)) for share in shares]
    assert all(len(part) == share.num_micro_batches for part, share in zip(parts, shares, strict=True))
    for rank, part in enumerate(parts):
        for m, micro_batch in enumerate(part):
            first = (m * dp_size + rank) * micro_batch_size
            assert micro_batch == list(range(first, first + micro_batch_size))
    assert sorted(s for part in parts for micro_batch in part for s in micro_batch) == list(range(GLOBAL))


def rank_tokens(
    source: Blend, legs: list[tuple[ParallelConfig, int, int]]
) -> list[list[tuple[list[int], torch.Tensor, torch.Tensor]]]:
    """On a rank: the rows and columns of a run whose mesh, micro-batch and readers change on the way."""
    consumed, found = 0, []
    for parallel, micro_batch_size, workers in legs:
        axes = Axes.build(parallel, torch.device("cpu"))
        share = Share(GLOBAL, micro_batch_size, axes.dp_rank, axes.dp_size, axes.spans(T))
        config = DataConfig(num_workers=workers)
        for _ in range(2):  # steps; each leg opens anew, as a resumed run does
            batches = take(Loader(source, consumed, share, config, pin=False), share.num_micro_batches)
            rows = [s for micro in share.micro_batches(range(consumed, consumed + GLOBAL)) for s in micro]
            columns = axes.take_local(torch.arange(T)[None])[0]
            content = torch.stack([torch.cat([b[i].double() for b in batches]) for i in range(3)], -1)
            found.append((rows, columns, content))
            consumed += GLOBAL
    return found


# Four ranks each time: D, dp, tp, cp, the micro-batch and the readers change while the run goes on.
LEGS = [
    (ParallelConfig(tsp=4, dp_shard=1), 12, 0),
    (ParallelConfig(tsp=2, dp_shard=2), 3, 0),
    (ParallelConfig(dp_shard=4), 1, 2),
    (ParallelConfig(tp=2, cp=2, dp_shard=1), 4, 0),
    (ParallelConfig(tp=4, dp_shard=1), 6, 1),
    (ParallelConfig(dp_replicate=2, dp_shard=1, tsp=2), 2, 0),
]


def test_the_sequence_of_samples_does_not_depend_on_the_ranks(folder):
    source = blend(folder)
    draws = source.draw(0, 2 * GLOBAL * len(LEGS))
    ids, labels, mask, _ = read_batch(source, draws)
    expected = torch.stack([ids.double(), labels.double(), mask.double()], -1)
    seen = torch.zeros(expected.shape[:2])
    for steps in run_distributed(rank_tokens, 4, source, LEGS):
        for rows, columns, content in steps:
            assert torch.equal(content, expected[rows][:, columns])
            seen[torch.tensor(rows)[:, None], columns] += 1
    for leg, (parallel, _, _) in enumerate(LEGS):  # every token of every sample is on one rank
        rows = slice(2 * GLOBAL * leg, 2 * GLOBAL * (leg + 1))
        assert torch.equal(seen[rows], torch.ones_like(seen[rows])), parallel


def test_places_that_are_left_out_are_jumped_over():
    left_out = ((3, 5), (8, 9), (9, 12))
    allowed = [place for place in range(100) if not any(a <= place < b for a, b in left_out)]
    for cursor in (*range(14), 20):
        for count in (1, 2, 5, 9):
            runs = next_runs(cursor, count, left_out)
            places = [place for start, stop in runs for place in range(start, stop)]
            assert places == [place for place in allowed if place >= cursor][:count], (cursor, count)


def test_a_loader_goes_on_behind_what_is_left_out_whatever_the_batch(folder):
    source, left_out = blend(folder), ((5, 20), (31, 33))
    expected = [draw for draw in source.draw(0, 41) if draw not in source.draw(5, 15) + source.draw(31, 2)]
    cursor, seen = 0, []
    for size in (12, 6, 6):  # a resumed run may have another batch size
        share = Share(size, size, 0, 1, ((0, T),))
        loader = Loader(source, cursor, share, DataConfig(num_workers=0), pin=False, left_out=left_out)
        seen.append(take(loader, 1)[0])
        _, cursor = next_draws(source, cursor, size, left_out)
    assert cursor == 41
    wanted = read_batch(source, expected)
    for i in range(3):
        assert torch.equal(torch.cat([batch[i] for batch in seen]), wanted[i])


def test_processes_that_read_ahead_change_nothing(folder):
    source = blend(folder)
    share = Share(GLOBAL, 3, 1, 2, ((0, 6), (42, 48)))
    alone = take(Loader(source, 24, share, DataConfig(num_workers=0), pin=False), 8)
    others = take(Loader(source, 24, share, DataConfig(num_workers=2, prefetch_factor=2), pin=False), 8)
    for one, other in zip(alone, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert alone[0][0].shape == (3, 12) and alone[0][3].shape == (3, T)


def test_batches_are_ready_before_they_are_asked_for(folder):
    source = blend(folder)
    loader = Loader(source, 0, Share(GLOBAL, 3, 0, 1, ((0, T),)), DataConfig(num_workers=1), pin=False)
    try:
        next(loader)
        queue = loader._iterator._data_queue  # what has arrived from the process
        wait_until(lambda: queue.qsize() >= 3, lambda: f"{queue.qsize()} batches are ready")
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_is_the_users_error(folder, workers):
    source = blend(folder, vocab_size=257)
    for mixed in source.sources:
        object.__setattr__(mixed.samples.reading, "vocab_size", 100)
    loader = Loader(source, 0, Share(GLOBAL, 3, 0, 1, ((0, T),)), DataConfig(num_workers=workers), pin=False)
    with pytest.raises(ValueError, match="^[^\n]*holds the id [0-9]+, and model.vocab_size is 100"):
        take(loader, 1)


def test_torchs_random_numbers_are_left_alone(folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(Loader(blend(folder), 0, Share(GLOBAL, 3, 0, 1, ((0, T),)), DataConfig(num_workers=0), pin=False), 1)
    assert torch.equal(torch.get_rng_state(), before)
