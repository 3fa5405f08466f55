"""AdamW and clipping equal torch's on the dense model, on any mesh; apex is the real one or refused."""

import sys
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from dense import DenseGPT
from distributed import run_distributed
from parity import MODEL, Case, batch, case, load, relative_error, weights
from torch.distributed.tensor import DTensor

from megatsp.axes import Axes
from megatsp.model.parallelize import build_model
from megatsp.schema import OptimizerConfig
from megatsp.training.optimizer import MOMENTS, AdamW, clip_gradients, load_apex_adam
from megatsp.tsp.partition import take_local

SAMPLES, STEPS = 4, 3
SETTINGS = OptimizerConfig(
    lr=0.01, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6, clip_grad=0.5
)
TINY = replace(MODEL, qk_layernorm=True, add_qkv_bias=True)  # parameters that every tsp rank holds whole
State = dict[str, torch.Tensor]


def dense_steps() -> tuple[list[float], State]:
    """Gradient norms and final weights of the dense model under torch's own clipping and AdamW."""
    model = DenseGPT(TINY)
    model.load_state_dict(weights(TINY))
    groups = [
        dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=SETTINGS.weight_decay),
        dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0),
    ]
    betas = (SETTINGS.adam_beta1, SETTINGS.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=betas, eps=SETTINGS.adam_eps)
    norms = []
    for _ in range(STEPS):
        model.loss(*batch(SAMPLES)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_grad).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, model.state_dict()


def take_steps(case_: Case, settings: OptimizerConfig) -> tuple[list[float], State, AdamW]:
    """On a rank: the same with ours."""
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt = build_model(case_.config(), axes)
    load(gpt, weights(TINY))
    optimizer = AdamW(gpt, settings)
    ids, labels, mask = batch(SAMPLES)
    mine = slice(axes.dp_rank * SAMPLES // axes.dp_size, (axes.dp_rank + 1) * SAMPLES // axes.dp_size)
    local = [take_local(t[mine], axes.tsp.rank, axes.tsp.size) for t in (ids, labels, mask)]
    norms = []
    for _ in range(STEPS):
        (gpt(*local).sum() / mask.sum()).backward()
        norms.append(clip_gradients(gpt, settings.clip_grad).item())
        optimizer.step(settings.lr)
        assert all(p.grad is None for p in gpt.parameters())
    return norms, {name: p.detach().full_tensor() for name, p in gpt.named_parameters()}, optimizer


def norms_and_weights(case_: Case) -> tuple[list[float], State]:
    return take_steps(case_, SETTINGS)[:2]


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], State]:
    norms, state = dense_steps()
    assert min(norms) > 2 * SETTINGS.clip_grad  # so that clipping matters
    return norms, state


MESHES = [
    pytest.param(1, {}, id="1"),
    pytest.param(2, dict(tsp=2), id="tsp2"),
    pytest.param(4, dict(tsp=2, dp_shard=2), id="dp_shard2-tsp2"),
    pytest.param(2, dict(tsp=1, dp_replicate=2), id="dp_replicate2"),
]


@pytest.mark.parametrize(("world_size", "parallel"), MESHES)
def test_three_clipped_steps_equal_torchs(expected, world_size, parallel):
    case_ = case(**{"tsp": 1, **parallel})
    results = run_distributed(norms_and_weights, world_size, replace(case_, model=TINY))
    norms, state = results[0]
    assert all(other == norms for other, _ in results)  # to the bit, or ranks would part ways
    assert norms == pytest.approx(expected[0], rel=1e-5)
    assert state.keys() == expected[1].keys()
    for name, weight in state.items():
        moved = expected[1][name] - weights(TINY)[name]
        assert relative_error(weight - weights(TINY)[name], moved) < 1e-4, name


def measure(limit: float, poison: bool) -> tuple[float, bool]:
    """On a rank: the norm, and whether clipping changed any gradient."""
    gpt = build_model(case(tsp=2).config(), Axes.build(case(tsp=2).parallel, torch.device("cpu")))
    for p in gpt.parameters():
        p.grad = torch.ones_like(p)
    if poison and dist.get_rank() == 1:
        next(gpt.parameters()).grad.to_local().fill_(torch.nan)
    before = [p.grad.to_local().clone() for p in gpt.parameters()]
    norm = clip_gradients(gpt, limit).item()
    pairs = zip(before, gpt.parameters(), strict=True)
    return norm, not all(torch.equal(a.nan_to_num(7), p.grad.to_local().nan_to_num(7)) for a, p in pairs)


def test_clipping_leaves_small_and_non_finite_gradients():
    norm = sum(p.numel() for p in DenseGPT(MODEL).parameters()) ** 0.5
    assert run_distributed(measure, 2, 0.0, False)[0] == (pytest.approx(norm), False)
    assert run_distributed(measure, 2, 2 * norm, False)[0] == (pytest.approx(norm), False)
    assert run_distributed(measure, 2, norm / 2, False)[0] == (pytest.approx(norm), True)
    for found, changed in run_distributed(measure, 2, norm / 2, True):
        assert found != found and not changed  # NaN, also where the gradients are finite


def decayed_names() -> tuple[set[str], set[str]]:
    """On a rank: the parameters that move, and those that stay, under zero gradients."""
    case_ = replace(case(tsp=1), model=TINY)
    gpt = build_model(case_.config(), Axes.build(case_.parallel, torch.device("cpu")))
    load(gpt, weights(TINY))
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)
    AdamW(gpt, SETTINGS).step(0.5)
    moved, stayed = set(), set()
    for name, p in gpt.named_parameters():
        old, new = weights(TINY)[name], p.detach().full_tensor()
        if torch.equal(old, new):
            stayed.add(name)
        else:
            torch.testing.assert_close(new, old * (1 - 0.5 * SETTINGS.weight_decay))
            moved.add(name)
    return moved, stayed


def test_only_matrices_decay():
    moved, stayed = run_distributed(decayed_names, 1)[0]
    state = weights(TINY)
    assert moved == {name for name, tensor in state.items() if tensor.dim() == 2}
    assert stayed == {name for name, tensor in state.items() if tensor.dim() == 1}


class FusedAdam(torch.optim.Optimizer):
    """What apex.optimizers.FusedAdam computes and keeps, in plain torch on plain tensors."""

    def __init__(self, params, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                assert type(p) is torch.nn.Parameter and type(p.grad) is torch.Tensor
                state = self.state[p]
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                first = state["exp_avg"] / (1 - beta1**step)
                second = state["exp_avg_sq"] / (1 - beta2**step)
                update = first / (second.sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(group["lr"] * update)


def install(modules: dict[str, dict[str, object]]) -> None:
    """Makes these modules importable, with these contents."""
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module


GENUINE: dict[str, dict[str, object]] = {
    "apex": {},
    "apex.optimizers": {"FusedAdam": FusedAdam},
    "amp_C": {},
}


def apex_steps(case_: Case) -> tuple[list[float], State]:
    """On a rank: three steps through a stand-in for apex, and how it is wired."""
    install(GENUINE)
    DTensor.is_cuda = True  # there is no GPU: only the check is told otherwise
    norms, state, optimizer = take_steps(case_, replace(SETTINGS, name="apex_fused_adam"))
    named, handles = optimizer._named, optimizer._handles
    assert all(handles[name].data_ptr() == p.to_local().data_ptr() for name, p in named.items())
    moments = optimizer.tensors()
    assert moments.keys() == {f"optimizer.{moment}.{name}" for moment in MOMENTS for name in named}
    for name, tensor in moments.items():
        like = named[name.split(".", 2)[2]]
        assert isinstance(tensor, DTensor) and tensor.shape == like.shape
        assert tensor.placements == like.placements
    assert all(moments[f"optimizer.exp_avg_sq.{name}"].full_tensor().any() for name in named)
    assert [group["step"] for group in optimizer._optimizer.param_groups] == [STEPS, STEPS]
    optimizer.loaded(7)
    assert [group["step"] for group in optimizer._optimizer.param_groups] == [7, 7]
    return norms, state


@pytest.mark.parametrize(("world_size", "parallel"), MESHES[1:3])
def test_apex_gets_the_shards_and_gives_the_same_steps(expected, world_size, parallel):
    norms, state = run_distributed(apex_steps, world_size, replace(case(**parallel), model=TINY))[0]
    assert norms == pytest.approx(expected[0], rel=1e-5)
    for name, weight in state.items():
        moved = expected[1][name] - weights(TINY)[name]
        assert relative_error(weight - weights(TINY)[name], moved) < 1e-4, name


@pytest.fixture
def no_apex(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], None]:
    """No apex, genuine or other; returns a function that installs modules until the test ends."""
    for name in GENUINE:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    return install


APEX_ERRORS = [
    pytest.param({}, id="missing"),
    pytest.param({"apex": {"__doc__": "Pyramid, Velruse and OAuth: PyPI's apex"}}, id="unrelated"),
    pytest.param({"apex": {}, "apex.optimizers": {}}, id="without-fused-adam"),
    pytest.param({"apex": {}, "apex.optimizers": {"FusedAdam": FusedAdam}}, id="without-extensions"),
]


@pytest.mark.parametrize("modules", APEX_ERRORS)
def test_what_is_not_apex_is_refused(no_apex, modules):
    no_apex(modules)
    if modules.keys() == {"apex"}:
        del sys.modules["apex.optimizers"]  # absent, as it is in that project
    with pytest.raises(ValueError, match="needs NVIDIA's or ROCm's apex") as caught:
        load_apex_adam()
    for advice in ("github.com/NVIDIA/apex", "github.com/ROCm/apex", "`pip install apex` gives an unrelated"):
        assert advice in str(caught.value)
    assert "optimizer=adamw" in str(caught.value) and "(Here: " in str(caught.value)


def test_genuine_apex_is_found(no_apex):
    no_apex(GENUINE)
    assert load_apex_adam() is FusedAdam


def apex_on_a_cpu() -> None:
    install(GENUINE)
    gpt = build_model(case(tsp=1).config(), Axes.build(case(tsp=1).parallel, torch.device("cpu")))
    with pytest.raises(ValueError, match="computes on a GPU only: use optimizer=adamw"):
        AdamW(gpt, replace(SETTINGS, name="apex_fused_adam"))


def test_genuine_apex_without_a_gpu_is_refused():
    run_distributed(apex_on_a_cpu, 1)
