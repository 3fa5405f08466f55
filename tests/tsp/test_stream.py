"""The order of posts, waits and uses: which transfer is on the wire while what is computed."""

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from megatsp.comm import Comm, Pending
from megatsp.tsp import swiglu
from megatsp.tsp.buckets import Bucket, Columns, even_cuts, h_major, mlp_part, owner_cuts
from megatsp.tsp.mlp import StreamedMLP
from megatsp.tsp.owner import Broadcast, Ring
from megatsp.tsp.stream import WeightStream
from megatsp.tsp.transport import Gather, Gradients

STEPS = 4
H, FFN = 4, 8


class FakeTransport:
    """Three posts and landings are written down in order; buckets come in reverse."""

    part = mlp_part(FFN, even_cuts(FFN, STEPS))
    steps = STEPS

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.most_alive = 0
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def note(self, what: str, step: int) -> None:
        self.log.append((what, step))

    def bucket(self, step: int) -> int:
        return STEPS - 1 - step

    def post(self, step: int, weights: list[Tensor], previous: Tensor | None) -> Pending:
        self.note("post", step)
        assert previous is None if step == 0 else previous[0, 0] == step - 1
        matrix = torch.full((H, 6), float(step))
        self._alive.add(matrix)
        self.most_alive = max(self.most_alive, len(self._alive))
        return Pending(matrix).then(partial(self._landed, step))

    def _landed(self, step: int, matrix: Tensor) -> Tensor:
        self.note("land", step)
        return matrix

    def columns(self, step: int, weights: list[Tensor], arrived: Tensor) -> Columns:
        return Columns.of(arrived, self.part.buckets[self.bucket(step)])

    def gradients(self, weights: list[Tensor]) -> "FakeGradients":
        return FakeGradients(self)


class FakeGradients:
    def __init__(self, transport: FakeTransport) -> None:
        self._transport = transport

    def buffer(self, step: int) -> Columns:
        return Columns.of(torch.empty(H, 6), self._transport.part.buckets[step])

    def send(self, step: int, gradient: Columns) -> None:
        self._transport.note("send", step)

    def finish(self) -> list[Tensor]:
        self._transport.note("finish", STEPS)
        return []


def walk(stream: WeightStream, transport: FakeTransport, following: Callable[[], None] | None = None):
    def use(step: int, bucket: Bucket, columns: Columns) -> None:
        assert bucket == transport.part.buckets[transport.bucket(step)]
        assert [piece.shape[1] for piece in columns.pieces] == [span.width for span in bucket]
        assert torch.equal(columns.whole, torch.full((H, 6), float(step)))
        transport.note("use", step)

    stream.walk([], use, following)


def test_the_next_bucket_is_posted_before_this_one_is_used():
    transport = FakeTransport()
    walk(WeightStream(transport), transport, lambda: transport.note("following", STEPS))
    assert transport.log == [
        ("post", 0),
        ("land", 0), ("post", 1), ("use", 0),
        ("land", 1), ("post", 2), ("use", 1),
        ("land", 2), ("post", 3), ("use", 2),
        ("land", 3), ("following", 4), ("use", 3),
    ]  # fmt: skip


def test_at_most_two_buckets_are_alive():
    transport = FakeTransport()
    walk(WeightStream(transport), transport)
    assert transport.most_alive == 2


@pytest.mark.parametrize("backward", [False, True])
def test_those_who_compute_let_go_of_a_bucket_before_another_is_posted(backward):
    transport = FakeTransport()
    mlp, x = StreamedMLP(WeightStream(transport), swiglu), torch.ones(1, 3, H)
    if backward:
        mlp.backward(x, x, [], {}, None)[1].finish()
        sent = [entry for entry in transport.log if entry[0] in ("send", "finish")]
        assert sent == [("send", 0), ("send", 1), ("send", 2), ("send", 3), ("finish", 4)]
    else:
        mlp.forward(x, [], False, None)
    assert transport.most_alive == 2


def test_a_prefetched_bucket_is_not_posted_again():
    transport = FakeTransport()
    stream = WeightStream(transport)
    stream.prefetch([])
    transport.note("elsewhere", -1)
    walk(stream, transport)
    assert transport.log[:4] == [("post", 0), ("elsewhere", -1), ("land", 0), ("post", 1)]
    walk(stream, transport)  # and another walk posts its own
    assert [entry for entry in transport.log if entry == ("post", 0)] == [("post", 0)] * 2


def test_prefetching_twice_raises():
    stream = WeightStream(FakeTransport())
    stream.prefetch([])
    with pytest.raises(RuntimeError, match="the first mlp bucket is on its way already"):
        stream.prefetch([])


class LoggedComm(Comm):
    """Writes down when a gradient's transfer is posted and when it is waited for."""

    def __init__(self) -> None:
        super().__init__(dist.group.WORLD)
        self.log: list[str] = []

    def _noted(self, pending: Pending) -> Pending:
        self.log.append("post")
        wait = pending.wait

        def noted_wait() -> Tensor:
            self.log.append("land")
            return wait()

        pending.wait = noted_wait  # type: ignore[method-assign]
        return pending

    def reduce_scatter(self, whole: Tensor, label: str) -> Pending:
        return self._noted(super().reduce_scatter(whole, label))

    def shift(self, outgoing: Tensor, incoming: Tensor, label: str) -> Pending:
        return self._noted(super().shift(outgoing, incoming, label))


def send_zeros(gradients: Gradients, step: int) -> None:
    buffer = gradients.buffer(step)
    for piece in buffer.pieces:
        piece.zero_()
    gradients.send(step, buffer)


def rank_gradient_order(name: str) -> list[str]:
    """On a rank: posts and landings of gradients between the buckets' computing."""
    comm = LoggedComm()
    if name == "gather":
        transport = Gather(mlp_part(FFN, even_cuts(FFN, STEPS)), comm, torch.float32)
        shards = [torch.zeros(FFN, H // 2), torch.zeros(FFN, H // 2), torch.zeros(H // 2, FFN)]
    else:
        transport = Ring(mlp_part(FFN, owner_cuts(FFN, 2, STEPS // 2)), comm, torch.float32)
        shards = [torch.zeros(FFN // 2, H), torch.zeros(FFN // 2, H), torch.zeros(H, FFN // 2)]
    gradients = transport.gradients(shards)
    for step in range(STEPS):
        comm.log.append(f"compute {step}")
        send_zeros(gradients, step)
    comm.log.append("finish")
    gradients.finish()
    return comm.log


def test_a_gathered_parts_gradient_lands_after_the_next_bucket_was_computed():
    for log in run_distributed(rank_gradient_order, 2, "gather"):
        assert log == [
            "compute 0", "post",
            "compute 1", "land", "post",
            "compute 2", "land", "post",
            "compute 3", "land", "post",
            "finish", "land",
        ]  # fmt: skip


def test_a_rings_gradient_lands_after_the_next_bucket_was_computed():
    # A round's first gradient is this rank's own and stays; its last hop brings the sum of it home.
    for log in run_distributed(rank_gradient_order, 2, "ring"):
        assert log == [
            "compute 0",
            "compute 1", "post",
            "compute 2", "land",
            "compute 3", "post",
            "finish", "land",
        ]  # fmt: skip


def rank_reduction_order() -> list[str]:
    """On a rank: a broadcast part's reductions, whose works are waited for one bucket later."""
    comm = Comm(dist.group.WORLD)
    log: list[str] = []

    class Work:
        def __init__(self, work) -> None:
            log.append("post")
            self._work = work

        def wait(self) -> None:
            log.append("land")
            self._work.wait()

    reduce = comm.reduce
    comm.reduce = lambda *arguments: Work(reduce(*arguments))  # type: ignore[method-assign]
    transport = Broadcast(mlp_part(FFN, even_cuts(FFN, 2)), comm, torch.float32)
    shards = [torch.zeros(FFN // 2, H), torch.zeros(FFN // 2, H), torch.zeros(H, FFN // 2)]
    gradients = transport.gradients(shards)
    for step in range(2):
        log.append(f"compute {step}")
        send_zeros(gradients, step)
    log.append("finish")
    gradients.finish()
    assert h_major(shards[0], transport.part.matrices[0]).shape == (H, FFN // 2)
    return log


def test_a_broadcast_parts_gradient_lands_after_the_next_bucket_was_computed():
    for log in run_distributed(rank_reduction_order, 2):
        assert log == ["compute 0", "post", "compute 1", "land", "post", "finish", "land"]
