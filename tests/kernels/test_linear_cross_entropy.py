"""Linear cross-entropy equals torch's, with every gradient, bucket by bucket, in bounded memory.

In fp32 and fp16: the interpreter multiplies bf16 matrices wrongly.
"""

import pytest
import torch
from checks import DEVICE, DTYPES, Poisoned, assert_near, randn
from megatsp_kernels.linear_cross_entropy import (
    buckets,
    cross_entropy_backward_step,
    cross_entropy_step,
    linear_cross_entropy,
    op,
)
from megatsp_kernels.linear_cross_entropy.reference import linear_cross_entropy as reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

N, H, V = 33, 17, 37  # no multiples of a tile, and three of its rows and columns
INF = float("inf")


def inputs(dtype: torch.dtype = torch.float32, n: int = N, h: int = H, v: int = V):
    """x [n, h], weight [v, h], targets [n] with the vocabulary's first and last row, and dlosses [n]."""
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[0], targets[-1] = 0, v - 1
    weight = (randn(v, h, seed=1) * h**-0.5).to(dtype)  # logits of about 1
    return randn(n, h, dtype=dtype), weight, targets, randn(n, seed=3)


def gradients(function, x, weight, targets, dlosses, **options):
    """Losses, dx and dweight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = function(x, weight, targets, **options)
    return losses.detach(), *torch.autograd.grad(losses, (x, weight), dlosses.to(losses.dtype))


def near_the_reference(ours, x, weight, targets, dlosses, **options):
    exact = gradients(reference, x.double(), weight.double(), targets, dlosses, **options)
    assert_near(ours, gradients(reference, x, weight, targets, dlosses, **options), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "num_buckets"), [((N, H, V), 1), ((N, H, V), 3), ((5, 16, 32), 2)])
def test_losses_and_gradients_equal_torchs(shape, num_buckets, dtype):
    memory = Poisoned()
    x, weight, targets, dlosses = (
        memory.of(t) if t.is_floating_point() else t for t in inputs(dtype, *shape)
    )
    ours = gradients(linear_cross_entropy, x, weight, targets, dlosses, num_buckets=num_buckets)
    near_the_reference(ours, x, weight, targets, dlosses)
    memory.check()


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 3), (3, 40, 2)])
def test_a_dim_of_one(shape):
    case = inputs(torch.float32, *shape)
    near_the_reference(gradients(linear_cross_entropy, *case), *case)


def test_a_weight_that_lies_the_other_way_round():
    x, _, targets, dlosses = inputs()
    whole = randn(H, V + 7)
    turned = whole[:, 3 : V + 3].t()
    near_the_reference(
        gradients(linear_cross_entropy, x, turned, targets, dlosses, num_buckets=2),
        x, turned, targets, dlosses,
    )  # fmt: skip


@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignored_rows_and_z_loss(ignore_index):
    x, weight, targets, dlosses = inputs()
    targets[3:20:2] = ignore_index
    options = dict(ignore_index=ignore_index, z_loss=0.01)
    ours = gradients(linear_cross_entropy, x, weight, targets, dlosses, num_buckets=2, **options)
    near_the_reference(ours, x, weight, targets, dlosses, **options)
    assert not ours[0][targets == ignore_index].any() and not ours[1][targets == ignore_index].any()


def test_all_rows_ignored():
    x, weight, targets, dlosses = inputs()
    targets[:] = -100
    for result in gradients(linear_cross_entropy, x, weight, targets, dlosses, z_loss=0.1):
        assert not result.any()  # neither numbers nor NaN


def test_a_target_outside_the_vocabulary_gives_nan_in_its_row_alone():
    x, weight, targets, dlosses = inputs()
    targets[3], targets[4], targets[5] = V, -1, 1 << 40
    losses, dx, dweight = gradients(linear_cross_entropy, x, weight, targets, dlosses)
    bad = torch.isin(torch.arange(N, device=DEVICE), torch.tensor([3, 4, 5], device=DEVICE))
    assert losses[bad].isnan().all() and dx[bad].isnan().all()
    assert losses[~bad].isfinite().all() and dx[~bad].isfinite().all()
    assert dweight.isnan().all()


def test_large_logits_do_not_overflow():
    x, weight, targets, dlosses = inputs()
    case = 40 * x, weight, targets, dlosses
    near_the_reference(gradients(linear_cross_entropy, *case), *case)


def forward(x: Tensor, w: Tensor, targets: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    lse, target_logit = torch.full((len(x),), -INF, device=DEVICE), torch.zeros(len(x), device=DEVICE)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        cross_entropy_step(x, w[:, start:stop], targets, start, lse, target_logit)
    return lse, target_logit


@pytest.mark.parametrize("transposed", [False, True])
def test_steps_carry_from_bucket_to_bucket(transposed):
    x, weight, targets, _ = inputs()
    targets[:6] = torch.tensor([0, 16, 17, 18, 30, 36])  # on both sides of every border
    w = weight.t() if transposed else weight.t().contiguous()
    lse, target_logit = forward(x, w, targets, [0, 17, 17, 18, 31, V])  # one bucket empty, one of one row
    logits = x.double() @ weight.double().t()
    assert_near([lse], [lse], [logits.logsumexp(-1)])
    assert_near([target_logit], [target_logit], [logits.gather(1, targets[:, None])[:, 0]])
    torch.testing.assert_close((lse, target_logit), forward(x, w, targets, [0, V]), rtol=1e-6, atol=1e-6)


def test_a_step_without_the_target_leaves_its_logit():
    x, weight, targets, _ = inputs()
    lse, target_logit = torch.full((N,), -INF, device=DEVICE), torch.full((N,), 3.0, device=DEVICE)
    cross_entropy_step(x, weight.t(), targets, 1000, lse, target_logit)
    assert (target_logit == 3.0).all() and lse.isfinite().all()
    beside = torch.full_like(targets, 17)
    beside[::2] = 8  # the row after the bucket's last, and the one before its first
    cross_entropy_step(x, weight[9:17].t(), beside, 9, lse, target_logit)
    assert (target_logit == 3.0).all()


def dlogits_of(
    x: Tensor, w: Tensor, targets: Tensor, start: int, lse: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    softmax = (x.double() @ w.double() - lse.double()[:, None]).exp()
    hit = torch.arange(start, start + w.shape[1], device=DEVICE) == targets[:, None]
    return a[:, None] * softmax - b[:, None] * hit


@pytest.mark.parametrize(
    ("w_transposed", "dw_transposed", "stop", "columns"),
    [(False, False, 34, None), (True, False, 34, 9), (False, True, 34, 9), (True, True, 13, 1)],
)
def test_backward_step_in_chunks(w_transposed, dw_transposed, stop, columns):
    """a and b are independent, dx is added to, dw is a slice of a larger gradient. columns: of a chunk."""
    x, weight, targets, _ = inputs()
    a, b, start = randn(N, seed=4), randn(N, seed=5), 11
    a[:5], b[:5] = 0, 0
    whole = weight.t() if w_transposed else weight.t().contiguous()
    w, (lse, _) = whole[:, start:stop], forward(x, whole, targets, [0, V])
    unused = lse.clone()
    unused[:2] = torch.tensor([-INF, float("nan")])  # in ignored rows
    memory = Poisoned()
    before, wide = randn(N, H, seed=6), memory.empty(V, H) if dw_transposed else memory.empty(H, V).t()
    dx, dw = memory.of(before), wide.t()[:, start:stop]
    workspace_bytes = 1 << 28 if columns is None else columns * N * 4
    result = cross_entropy_backward_step(x, w, targets, start, unused, a, b, dx, dw, workspace_bytes)
    assert result[0] is dx and result[1] is dw
    dlogits = dlogits_of(x, w, targets, start, lse, a, b)
    assert_near([dx], [dx], [before.double() + dlogits @ w.double().t()])
    assert_near([dw], [dw], [x.double().t() @ dlogits])
    assert torch.equal(dx[:5], before[:5])
    assert wide[:start].isnan().all() and wide[stop:].isnan().all()
    memory.check()


@pytest.mark.parametrize("transposed", [False, True])
def test_backward_step_makes_what_is_not_given(transposed):
    """Twice, with the same bits; dw lies as w, and in fp32 is what lower precision rounds."""
    x, weight, targets, _ = inputs(torch.float16)
    w = weight.t() if transposed else weight.t().contiguous()
    a, b, (lse, _) = randn(N, seed=4), randn(N, seed=5), forward(x, w, targets, [0, V])
    dx, dw = cross_entropy_backward_step(x, w, targets, 0, lse, a, b)
    assert dx.dtype == torch.float32 and dw.dtype == torch.float16 and dw.stride() == w.stride()
    again = cross_entropy_backward_step(x, w, targets, 0, lse, a, b)
    wide = cross_entropy_backward_step(
        x, w, targets, 0, lse, a, b, dw=torch.empty_like(w, dtype=torch.float32)
    )
    for mine, same in ((dx, again[0]), (dw, again[1]), (dx, wide[0]), (dw, wide[1].half())):
        assert torch.equal(mine, same)
    alone, none = cross_entropy_backward_step(x, w, targets, 0, lse, a, b, need_dw=False)
    assert torch.equal(alone, dx) and none is None
    assert torch.equal(lse, forward(x, w, targets, [0, V])[0])


class Watch(TorchDispatchMode):
    """The largest tensor that any operation allocated, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(results) if isinstance(t, Tensor)]
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like", "new_full", "zeros_like"):
            self.largest = max([self.largest, *sizes])
        return results


def test_memory():
    """Nothing of n V elements in the forward, nothing above the workspace in the backward."""
    x, weight, targets, _ = inputs(h=8, v=150)
    lse, target_logit, ones = torch.full((N,), -INF, device=DEVICE), randn(N), torch.ones(N, device=DEVICE)
    with Watch() as watch:
        buckets.forward(x, weight.t(), targets, 0, lse, target_logit)
    assert 0 < watch.largest <= 8 * N * 8  # at most eight splits' maxima and sums
    dx, dw, limit = torch.empty_like(x), torch.empty_like(weight).t(), 60 * N * 4
    with Watch() as watch:
        buckets.backward(x, weight.t(), targets, 0, lse, ones, ones, dx, dw, False, limit)
    assert limit / 2 < watch.largest <= limit


@pytest.mark.parametrize("empty", ["n", "h", "v"])
def test_empty_inputs(empty):
    sizes = dict(n=3, h=5, v=7) | {empty: 0}
    x, weight = randn(sizes["n"], sizes["h"]), randn(sizes["v"], sizes["h"])
    targets = torch.zeros(sizes["n"], dtype=torch.int64, device=DEVICE)
    lse, target_logit = forward(x, weight.t(), targets, [0, sizes["v"]])
    torch.testing.assert_close(lse, (x @ weight.t()).logsumexp(-1))
    dx, dw = cross_entropy_backward_step(x, weight.t(), targets, 0, lse, target_logit, target_logit)
    assert dx.shape == x.shape and dw.shape == weight.t().shape
    assert not dx.any() and not dw.any()


def test_a_frozen_side_gets_no_gradient():
    x, weight, targets, dlosses = inputs()
    _, dx, dweight = gradients(linear_cross_entropy, x, weight, targets, dlosses)
    for mine, expected in ((x, dx), (weight, dweight)):
        leaf = mine.detach().requires_grad_()
        losses = linear_cross_entropy(leaf if mine is x else x, leaf if mine is weight else weight, targets)
        assert torch.equal(torch.autograd.grad(losses, leaf, dlosses)[0], expected)


def test_chunks_and_splits():
    for rows, columns, most in ((16384, 16032, 8192), (16384, 32000, 8192), (100, 1000, 300), (10, 50, 20)):
        width = buckets.chunk_columns(rows, columns, 2, rows * 2 * most)
        assert width <= most and -(-columns // width) == -(-columns // (most - most % 128 or most))
    assert buckets.chunk_columns(10, 50, 2, 1 << 20) == 50
    for row_blocks, blocks, at_once in (
        (64, 250, 304),
        (128, 63, 132),
        (1, 1, 132),
        (1, 501, 304),
        (999, 7, 6),
    ):
        splits, split_blocks = buckets.split(row_blocks, blocks, at_once)
        assert (splits - 1) * split_blocks < blocks <= splits * split_blocks
        waves = -(-row_blocks * splits // at_once)
        assert waves * split_blocks <= 1.1 * row_blocks * blocks / at_once + 2  # near the ideal time
    assert buckets.split(999, 7, 6)[0] == 1


def test_opcheck():
    x, weight, targets, _ = inputs(torch.float32, 3, 5, 7)
    lse, ones = torch.full((3,), -INF, device=DEVICE), torch.ones(3, device=DEVICE)
    torch.library.opcheck(op._step, (x, weight.t(), targets, 0, lse, ones))
    leaves = x.requires_grad_(), weight.t().detach().requires_grad_()
    torch.library.opcheck(
        op._loss, (*leaves, targets, -100, 0.1, 2), test_utils=("test_schema", "test_faketensor")
    )


def test_it_works_on_fake_tensors():
    with FakeTensorMode():
        x, weight = torch.empty(4, 8, requires_grad=True), torch.empty(10, 8, requires_grad=True)
        targets, ones = torch.empty(4, dtype=torch.int64), torch.empty(4)
        losses = linear_cross_entropy(x, weight, targets, num_buckets=2)
        losses.sum().backward()
        assert losses.shape == (4,) and x.grad.shape == (4, 8) and weight.grad.shape == (10, 8)
        cross_entropy_step(x, weight.t(), targets, 0, ones, ones.clone())
        dx, dw = cross_entropy_backward_step(
            x.bfloat16(), weight.bfloat16().t(), targets, 0, ones, ones, ones
        )
        assert dx.dtype == torch.float32 and dw.dtype == torch.bfloat16 and dw.shape == (8, 10)


def step(**changes):
    n = 3
    arguments = dict(
        x=torch.zeros(n, 4), w=torch.zeros(4, 6), targets=torch.zeros(n, dtype=torch.int64), start=0
    )
    cross_entropy_step(**arguments | dict(lse=torch.zeros(n), target_logit=torch.zeros(n)) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(3, 4).double()), "x is float64; it takes float32, float16, bfloat16"),
        (dict(w=torch.zeros(4, 6).half()), "w is float16; it takes float32"),
        (dict(x=torch.zeros(4, 3).t()), r"x must be contiguous \[n, h\]; got float32 \(3, 4\) with strides"),
        (dict(w=torch.zeros(5, 6)), r"h = 4 .*got float32 \(5, 6\)"),
        (dict(w=torch.zeros(8, 12)[::2, ::2]), r"one dim contiguous.*strides \(24, 2\)"),
        (dict(w=torch.zeros(6).expand(4, 6)), r"one dim contiguous.*strides \(0, 1\)"),
        (dict(w=torch.empty_strided((4, 6), (1 << 23, 1), device="meta")), "w is on meta, x on cpu"),
        (dict(targets=torch.zeros(3)), "targets is float32; it takes int64"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), r"int64 \[3\].*got int64 \(4,\)"),
        (dict(lse=torch.zeros(3, dtype=torch.int64)), r"lse must be contiguous float32 \[3\].*got int64"),
        (dict(target_logit=torch.zeros(6)[::2]), r"target_logit must be contiguous.*strides \(2,\)"),
    ],
)
def test_what_a_step_does_not_take_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        step(**changes)


def test_what_the_others_do_not_take_is_refused():
    x, weight, targets, ones = torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(3).long(), torch.zeros(3)
    bucket = x, weight.t(), targets, 0, ones, ones, ones
    with pytest.raises(ValueError, match=r"dx must be contiguous \(3, 4\) as x; got float32 \(4, 3\)"):
        cross_entropy_backward_step(*bucket, dx=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="dx is float16; it takes float32"):
        cross_entropy_backward_step(*bucket, dx=torch.zeros(3, 4).half())
    with pytest.raises(ValueError, match=r"dw must be \(4, 6\) as w .*strides \(0, 1\)"):
        cross_entropy_backward_step(*bucket, dw=torch.zeros(6).expand(4, 6))
    with pytest.raises(ValueError, match="workspace_bytes=8 holds no column of 3 rows; give at least 12"):
        cross_entropy_backward_step(*bucket, workspace_bytes=8)
    with pytest.raises(ValueError, match="dw is given, but need_dw=False"):
        cross_entropy_backward_step(*bucket, dw=torch.zeros(4, 6), need_dw=False)
    with pytest.raises(ValueError, match="num_buckets=7; it is from 1 to the vocabulary's 6 rows"):
        linear_cross_entropy(x, weight, targets, num_buckets=7)
    with pytest.raises(ValueError, match=r"weight must be \[V, h\]; got float32 \(6,\)"):
        linear_cross_entropy(x, weight[:, 0], targets)
    with pytest.raises(ValueError, match="stride below 8388608"):
        step(w=torch.empty_strided((2, 6), (1 << 23, 1)), x=torch.zeros(3, 2))
