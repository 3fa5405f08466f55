"""What is on the wire while attention computes: the order of posts, waits and kernels; on one process."""

from dataclasses import dataclass, field

import pytest
import torch
from megatsp_kernels.attention import sdpa
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatsp.comm import Comm, Pending
from megatsp.cp import blockwise
from megatsp.cp.sequence import sequence_attention


@dataclass
class Log:
    lines: list[str] = field(default_factory=list)
    blocks: list[StorageWeakRef] = field(default_factory=list)  # gathered keys and values
    most_blocks: int = 0  # that lived while a kernel ran

    def hold(self, block: Tensor) -> Tensor:
        self.blocks.append(StorageWeakRef(block.untyped_storage()))
        return block

    def compute(self) -> None:
        self.lines.append("compute")
        self.most_blocks = max(self.most_blocks, sum(not block.expired() for block in self.blocks))


class Work:
    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def wait(self) -> None:
        self.log.lines.append(f"wait {self.name}")


class Imagined(Comm):
    """A group whose other ranks send zeros; logs what is posted and waited for."""

    def __init__(self, size: int, rank: int, log: Log) -> None:
        super().__init__(None)
        self.size, self.rank, self.log = size, rank, log

    def _post(self, kind: str, label: str, result: Tensor) -> Pending:
        name = f"{kind} {label.split('/')[1]}"
        self.log.lines.append(f"post {name}")
        return Pending(result, [Work(self.log, name)], self.traffic)

    def all_gather(self, shard: Tensor, label: str) -> Pending:
        whole = shard.new_zeros(self.size * shard.shape[0], *shard.shape[1:])
        return self._post("gather", label, self.log.hold(whole))

    def reduce_scatter(self, whole: Tensor, label: str) -> Pending:
        return self._post("reduce", label, torch.zeros_like(whole[: whole.shape[0] // self.size]))

    def all_to_all(self, parts: Tensor, label: str) -> Pending:
        return self._post("all-to-all", label, torch.zeros_like(parts))

    def shift(self, outgoing: Tensor, incoming: Tensor, label: str) -> Pending:
        return self._post("hop", label, incoming.zero_())


@pytest.fixture
def log(monkeypatch) -> Log:
    log = Log()

    def logged(kernel):
        def call(*args):
            log.compute()
            return kernel(*args)

        return call

    for kernel in ("attention_forward", "attention_backward"):
        monkeypatch.setattr(sdpa, kernel, logged(getattr(sdpa, kernel)))
    monkeypatch.setattr(blockwise, "to_global", lambda shards, f=blockwise.to_global: log.hold(f(shards)))
    return log


def forward_and_backward(exchange: str, outer: int, inner: int, log: Log) -> tuple[list[str], list[str]]:
    """The lines of the forward and of the backward on rank (1, 1), or rank 1 where an axis has one."""
    place = [min(1, size - 1) for size in (outer, inner)]
    sequence = Imagined(outer * inner, place[0] * inner + place[1], log)
    comms = sequence, Imagined(outer, place[0], log), Imagined(inner, place[1], log)
    attention = sequence_attention(exchange, *comms, 1.0, sdpa)
    q, k, v, dout = torch.randn(4, 1, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    out, lse = attention.forward(q, k, v)
    forward, log.lines = log.lines, []
    _, gradients = attention.backward(dout, q, k, v, out, lse)
    log.lines.append("caller computes")
    gradients()
    return forward, log.lines


def test_ring(log):
    forward, backward = forward_and_backward("ring", 1, 3, log)
    assert forward == [
        "post hop forward", "compute",
        "wait hop forward", "post hop forward", "compute",
        "wait hop forward", "compute",
    ]  # fmt: skip
    assert backward == [
        "post hop backward", "compute",
        "wait hop backward", "post hop backward", "compute",
        "post hop gradients",
        "wait hop backward", "compute",
        "wait hop gradients", "post hop gradients",
        "caller computes",
        "wait hop gradients",
    ]  # fmt: skip


def test_all_gather(log):
    forward, backward = forward_and_backward("allgather", 1, 3, log)
    steps = ["post gather forward", "compute", "wait gather forward", "compute", "compute"]
    assert forward == steps
    assert backward == [
        *(line.replace("forward", "backward") for line in steps),
        "post reduce gradients", "caller computes", "wait reduce gradients",
    ]  # fmt: skip
    assert log.most_blocks == 1


def test_hierarchical_has_the_next_group_on_its_way_and_no_more(log):
    forward, backward = forward_and_backward("hierarchical", 3, 2, log)
    assert forward == [
        "post hop forward", "post gather forward", "compute",
        "wait gather forward", "wait hop forward", "post hop forward", "post gather forward", "compute",
        "wait gather forward", "wait hop forward", "post gather forward", "compute",
        "wait gather forward", "compute",
    ]  # fmt: skip
    assert backward == [
        "post hop backward", "post gather backward", "compute",
        "wait gather backward", "wait hop backward", "post hop backward", "post gather backward", "compute",
        "post reduce gradients",  # of our own group
        "wait gather backward", "wait hop backward", "post gather backward", "compute",
        "post reduce gradients",
        "wait gather backward", "compute",
        "wait reduce gradients", "post hop gradients", "post reduce gradients",
        "caller computes",
        "wait reduce gradients", "wait hop gradients", "post hop gradients",
        "wait reduce gradients", "wait hop gradients",
    ]  # fmt: skip
    assert log.most_blocks == 2


def test_ulysses_leaves_the_gradients_of_keys_and_values_on_their_way(log):
    there, back = (f"{verb} all-to-all forward" for verb in ("post", "wait"))
    forward, backward = forward_and_backward("ulysses", 1, 3, log)
    assert forward == [there, back, "compute", there, back]
    there, back = (line.replace("forward", "backward") for line in (there, back))
    assert backward == [there, back, "compute", there, there, back, "caller computes", back]


def test_ulysses_takes_no_heads_that_its_ranks_do_not_divide(log):
    with pytest.raises(AssertionError):
        forward_and_backward("ulysses", 2, 2, log)
