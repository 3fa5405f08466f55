"""Products that move weights and gradients between ranks while they compute, by Triton.

The transfers are explicit steps, in the same order on every rank and on one GPU stream:

    publish    this rank's slice of a bucket, cast, into its slot      [h/D, R]
    pull       everyone's slices, into the bucket                      [h, R]
    scatter    tiles of a gradient, to the ranks that own their rows   [h, m] of [h, R]
    reduce     what arrived here, summed over ranks                    [h/D, R]

A step waits for no later one of another rank, so none waits for ever: publish of an epoch waits for the
pulls of the epoch before the last, pull for publish, scatter for the reduce before the last, reduce for
scatter. Waits are bounded all the same. Nothing here is differentiable: callers write their backward.

Source: what travels is that of folded tensor and sequence parallelism, arXiv:2604.26294; transfers inside
the products' kernels are Flux's idea, arXiv:2406.06858.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatsp_kernels.common import Table, check_factor, check_tensors, choose, launch, overlaps_itself
from megatsp_kernels.peers import Layout, Memory, Status

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_PARTS = 4
_STRIDES = 2**21  # elements: within a tile, offsets of fp32 stay below 2^31 bytes


@dataclass(frozen=True)
class Peers:
    """One rank's view of its group: memory and its layout, and what becomes of waits.

    max_spins: polls of a flag before a wait fails.
    """

    memory: Memory
    layout: Layout
    status: Status
    max_spins: int


@dataclass(frozen=True)
class Pull:
    """The pull of an epoch's bucket into `landing` [h, R], contiguous."""

    peers: Peers
    epoch: int
    landing: Tensor


def publish(peers: Peers, epoch: int, columns: Sequence[Tensor], dtype: torch.dtype) -> None:
    """This rank's columns, side by side and in `dtype`, become what others pull in this epoch.

    Args:
        epoch: from 1 on; one more each time.
        columns: one to four [h/D, n_i] of one dtype (fp32, fp16 or bf16), any strides.
        dtype: what travels: fp32, fp16 or bf16.
    Raises:
        ValueError: other dtypes or shapes, a slice that the layout has no room for, no GPU, no triton.
    """
    rows, width = _check_parts("publish", columns, DTYPES)
    if dtype not in DTYPES:
        raise ValueError(f"publish: dtype is {dtype}; it takes float32, float16, bfloat16")
    _check_room("publish", rows * width * dtype.itemsize, peers.layout.slice_bytes, "slice_bytes")
    layout = peers.layout
    numbers = [peers.max_spins, peers.memory.rank, layout.ready, layout.pulled, layout.failed]
    _publish(
        peers.memory.table, peers.status.tensor, list(columns), dtype, layout.slot(epoch), _int32(epoch),
        layout.ranks, layout.pieces, numbers,
    )  # fmt: skip


def pull(job: Pull) -> None:
    """Fills `job.landing` [h, R] with all ranks' slices, rank p's in rows p; NaN where a wait failed.

    Raises: as `matmul_pull`.
    """
    empty = job.landing.new_empty(0, 0)
    matmul_pull(empty, empty, job)


def matmul_pull(a: Tensor, b: Tensor, job: Pull | None = None) -> Tensor:
    """a times b, summed in fp32; beside it, in the same kernel, some programs do `job`.

    Args:
        a: [n, h], b: [h, m]: fp32, fp16 or bf16, alike; each with a stride of 1 and none of 0.
    Returns:
        [n, m], contiguous, like a.
    Raises:
        ValueError: other dtypes, shapes or strides, a landing that the slices do not fit, no GPU, no triton.
    """
    _check_factors("matmul_pull", a, b)
    if job is None:
        return _matmul(a, b)
    peers, layout, landing = job.peers, job.peers.layout, job.landing
    check_tensors("matmul_pull", DTYPES, landing=landing, a=a)
    if landing.dim() != 2 or not landing.is_contiguous() or landing.shape[0] % layout.ranks:
        raise ValueError(
            f"matmul_pull: landing must be contiguous [h, R], h a multiple of {layout.ranks} ranks; got "
            f"{tuple(landing.shape)} with strides {landing.stride()}"
        )
    slice_bytes = landing.numel() * landing.element_size() // layout.ranks
    _check_room("matmul_pull", slice_bytes, layout.slice_bytes, "slice_bytes")
    numbers = [peers.max_spins, peers.memory.rank, layout.ready, layout.pulled, layout.failed]
    return _matmul_pull(
        a, b, landing, peers.memory.table, peers.status.tensor, layout.slot(job.epoch), _int32(job.epoch),
        layout.ranks, layout.pieces, numbers,
    )  # fmt: skip


def scatter_tiles(peers: Peers, a: Tensor, b: Tensor) -> int:
    """Tiles that `matmul_scatter` of these sends to each owner."""
    config, _ = choose(_scatter_table(a.dtype), a.device)
    row_tiles = -(-(a.shape[0] // peers.layout.ranks) // config.blocks["BM"])
    return row_tiles * -(-b.shape[1] // config.blocks["BN"])


def matmul_scatter(
    a: Tensor, b: Tensor, peers: Peers, epoch: int, freed: int, first: int, width: int
) -> None:
    """a times b, summed in fp32: each tile goes, in fp32, to the rank that owns its rows.

    Args:
        a: [h, n], b: [n, m]: fp32, fp16 or bf16, alike; each with a stride of 1 and none of 0.
        epoch: of the gradient; from 1 on.
        freed: how many summing programs must have ended with each owner before its place is written.
        first: where in the gradient's `width` columns those of b begin.
    Raises:
        ValueError: other dtypes, shapes or strides, no room in the layout, no GPU, no triton.
    """
    _check_factors("matmul_scatter", a, b)
    layout = peers.layout
    if a.shape[0] % layout.ranks or not 0 <= first <= first + b.shape[1] <= width:
        raise ValueError(
            f"matmul_scatter: {layout.ranks} ranks must divide a's rows, and columns {first} to "
            f"{first + b.shape[1]} lie in {width}; got {tuple(a.shape)} times {tuple(b.shape)}"
        )
    rows = a.shape[0] // layout.ranks
    _check_room("matmul_scatter", 4 * rows * width, layout.gradient_bytes, "gradient_bytes")
    numbers = [peers.max_spins, peers.memory.rank, layout.arrived, layout.freed, layout.failed]
    _matmul_scatter(
        a, b, peers.memory.table, peers.status.tensor, layout.staging(epoch), layout.source_bytes,
        _int32(freed), first, width, layout.ranks, numbers,
    )  # fmt: skip


def reduce_programs(device: torch.device) -> int:
    """Summing programs of one `reduce`: what `freed` counts."""
    from megatsp_kernels.streamed.triton import REDUCE

    return choose(REDUCE, device)[0].blocks["PROGRAMS"]


def reduce(peers: Peers, epoch: int, arrived: int, outs: Sequence[Tensor]) -> None:
    """Sums what all ranks sent here in this epoch, rank 0's first, into `outs`; NaN where a wait failed.

    Args:
        arrived: how many tiles must have come from each rank, since the first epoch.
        outs: one to four [h/D, n_i] in fp32, any strides but 0: the gradient's columns in order.
    Raises:
        ValueError: other dtypes, shapes or strides, no room in the layout, no GPU, no triton.
    """
    rows, width = check_outs("reduce", outs)
    layout = peers.layout
    _check_room("reduce", 4 * rows * width, layout.gradient_bytes, "gradient_bytes")
    numbers = [peers.max_spins, peers.memory.rank, layout.arrived, layout.freed, layout.failed]
    _reduce(
        peers.memory.table, peers.status.tensor, list(outs), layout.staging(epoch), layout.source_bytes,
        _int32(arrived), layout.ranks, numbers,
    )  # fmt: skip


def check_outs(op: str, outs: Sequence[Tensor]) -> tuple[int, int]:
    """Rows and the sum of widths of what `reduce` can fill.

    Raises:
        ValueError: other dtypes or shapes than `reduce` takes, or an expanded tensor.
    """
    rows, width = _check_parts(op, outs, (torch.float32,))
    for i, out in enumerate(outs):
        if overlaps_itself(out):
            raise ValueError(
                f"{op}: columns[{i}] overlaps itself: got {tuple(out.shape)} with strides {out.stride()}; "
                "pass one made by .contiguous()"
            )
    return rows, width


def _check_parts(op: str, parts: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[int, int]:
    """Rows and the sum of widths of parts that lie side by side."""
    if not 1 <= len(parts) <= _MOST_PARTS:
        raise ValueError(f"{op}: one to {_MOST_PARTS} column ranges; got {len(parts)}")
    check_tensors(op, dtypes, **{f"columns[{i}]": part for i, part in enumerate(parts)})
    shapes = [tuple(part.shape) for part in parts]
    if len({part.dtype for part in parts}) > 1 or any(
        len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes
    ):
        raise ValueError(f"{op}: columns must be [h/D, n_i] of one dtype and as many rows; got {shapes}")
    return shapes[0][0], sum(shape[1] for shape in shapes)


def _check_factors(op: str, a: Tensor, b: Tensor) -> None:
    check_tensors(op, DTYPES, a=a, b=b)
    if a.numel():
        check_factor(op, a)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise ValueError(
            f"{op}: a [n, k] and b [k, m] of one dtype; got {tuple(a.shape)} {a.dtype} and "
            f"{tuple(b.shape)} {b.dtype}"
        )
    for name, tensor in (("a", a), ("b", b)):
        strides = _strides(tensor)
        if 1 not in strides or 0 in strides or (tensor.numel() and max(*strides, b.shape[1]) >= _STRIDES):
            raise ValueError(
                f"{op}: {name} must have a stride of 1, none of 0 (expanded), and no stride or row of "
                f"{_STRIDES} or more; got {tuple(tensor.shape)} with strides {tensor.stride()}: "
                "use .contiguous()"
            )


def _check_room(op: str, needed: int, room: int, key: str) -> None:
    if needed > room:
        raise ValueError(f"{op}: a slice of {needed} bytes, but the layout's {key} is {room}")


def _padded(parts: list[Tensor]) -> list[Tensor | int]:
    """Four parts' tensors, widths, row strides and column strides, as kernels take them."""
    four = parts + parts[:1] * (_MOST_PARTS - len(parts))
    widths = [p.shape[1] for p in parts] + [0] * (_MOST_PARTS - len(parts))
    return [*four, *widths, *(p.stride(0) for p in four), *(p.stride(1) for p in four)]


def _int32(number: int) -> int:
    """Counters wrap around, as a GPU's do."""
    return (number + 2**31) % 2**32 - 2**31


def _strides(tensor: Tensor) -> list[int]:
    """Strides, but 1 where none is ever taken, whatever torch says: a dim of one element, an empty tensor."""
    return [
        stride if size > 1 and tensor.numel() else 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def _matmul_table(dtype: torch.dtype) -> Table:
    from megatsp_kernels.streamed.triton import MATMUL, MATMUL_FP32

    return MATMUL_FP32 if dtype == torch.float32 else MATMUL


def _scatter_table(dtype: torch.dtype) -> Table:
    from megatsp_kernels.streamed.triton import SCATTER, SCATTER_FP32

    return SCATTER_FP32 if dtype == torch.float32 else SCATTER


@torch.library.custom_op("megatsp::streamed_publish", mutates_args=("status",))
def _publish(
    table: Tensor, status: Tensor, columns: list[Tensor], dtype: torch.dtype, slot: int, epoch: int,
    ranks: int, pieces: int, numbers: list[int],
) -> None:  # fmt: skip
    import triton.language as tl

    from megatsp_kernels.streamed.triton import PUBLISH, publish_kernel

    spins, me, ready, pulled, failed = numbers
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    launch(
        publish_kernel, (pieces,), PUBLISH, table, status, *_padded(columns),
        columns[0].shape[0], sum(c.shape[1] for c in columns), slot, epoch, me, spins, ready, pulled, failed,
        DTYPE=types[dtype], PARTS=len(columns), RANKS=ranks, PIECES=pieces,
    )  # fmt: skip


@torch.library.custom_op("megatsp::streamed_matmul", mutates_args=())
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _launch_matmul(a, b, a, a, a, 0, 0, 1, 1, [0] * 5, False)


@torch.library.custom_op("megatsp::streamed_matmul_pull", mutates_args=("landing", "status"))
def _matmul_pull(
    a: Tensor, b: Tensor, landing: Tensor, table: Tensor, status: Tensor, slot: int, epoch: int,
    ranks: int, pieces: int, numbers: list[int],
) -> Tensor:  # fmt: skip
    return _launch_matmul(a, b, landing, table, status, slot, epoch, ranks, pieces, numbers, True)


def _launch_matmul(
    a: Tensor, b: Tensor, landing: Tensor, table: Tensor, status: Tensor, slot: int, epoch: int,
    ranks: int, pieces: int, numbers: list[int], pulls: bool,
) -> Tensor:  # fmt: skip
    from megatsp_kernels.streamed.triton import matmul_pull_kernel

    spins, me, ready, pulled, failed = numbers
    configs = _matmul_table(a.dtype)
    out = a.new_empty(a.shape[0], b.shape[1])
    blocks = choose(configs, a.device)[0].blocks
    tiles = -(-out.shape[0] // blocks["BM"]) * -(-out.shape[1] // blocks["BN"])
    launch(
        matmul_pull_kernel, (tiles + pulls * blocks["PULLS"],), configs, table, status, landing, a, b, out,
        landing.shape[0] // ranks, landing.shape[1], slot, epoch, me, spins, ready, pulled, failed,
        *out.shape, a.shape[1], *_strides(a), *_strides(b), PULL=pulls, RANKS=ranks, PIECES=pieces,
    )  # fmt: skip
    return out


@torch.library.custom_op("megatsp::streamed_matmul_scatter", mutates_args=("status",))
def _matmul_scatter(
    a: Tensor, b: Tensor, table: Tensor, status: Tensor, staging: int, source_bytes: int, target: int,
    first: int, width: int, ranks: int, numbers: list[int],
) -> None:  # fmt: skip
    from megatsp_kernels.streamed.triton import matmul_scatter_kernel

    spins, me, arrived, freed, failed = numbers
    configs = _scatter_table(a.dtype)
    blocks, rows = choose(configs, a.device)[0].blocks, a.shape[0] // ranks
    tiles = ranks * -(-rows // blocks["BM"]) * -(-b.shape[1] // blocks["BN"])
    launch(
        matmul_scatter_kernel, (tiles,), configs, table, status, a, b,
        staging, source_bytes, target, me, spins, arrived, freed, failed,
        rows, first, width, b.shape[1], a.shape[1], *_strides(a), *_strides(b), RANKS=ranks,
    )  # fmt: skip


@torch.library.custom_op("megatsp::streamed_reduce", mutates_args=("outs", "status"))
def _reduce(
    table: Tensor, status: Tensor, outs: list[Tensor], staging: int, source_bytes: int, target: int,
    ranks: int, numbers: list[int],
) -> None:  # fmt: skip
    from megatsp_kernels.streamed.triton import REDUCE, reduce_kernel

    spins, me, arrived, freed, failed = numbers
    programs = choose(REDUCE, table.device)[0].blocks["PROGRAMS"]
    launch(
        reduce_kernel, (programs,), REDUCE, table, status, *_padded(outs),
        outs[0].shape[0], sum(o.shape[1] for o in outs), staging, source_bytes, target, me, spins,
        arrived, freed, failed, PARTS=len(outs), RANKS=ranks,
    )  # fmt: skip


@_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@_matmul_pull.register_fake
def _(a: Tensor, b: Tensor, *rest: object) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@_publish.register_fake
@_matmul_scatter.register_fake
@_reduce.register_fake
def _(*arguments: object) -> None:
    """They fill memory that is not theirs to allocate."""
