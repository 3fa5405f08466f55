"""Is a conversion right? Our logits against transformers', on fixed inputs, and why if it is not."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp import __version__
from megatsp.axes import Axes
from megatsp.hf.alone import logits_alone
from megatsp.hf.checkpoint import HFCheckpoint
from megatsp.hf.families import config_of
from megatsp.hf.first_rank import on_first_rank
from megatsp.hf.logits import logits
from megatsp.hf.reference import Reference
from megatsp.hf.source import HFSource, TensorSource
from megatsp.model.gpt import GPT
from megatsp.model.rotary import inverse_frequencies, rotary_table
from megatsp.schema import ModelConfig

VERIFICATION = "verification.json"
SAMPLES, LENGTH = 2, 64
_TOKENS = 16  # that are compared at once: a vocabulary's logits in fp64 are large
# In fp32 the two differ by the order of their sums. So their likeliest tokens differ in near ties alone.
_FP32_DIFFERENCE, _FP32_KL = 1e-4, 1e-6
_FREQUENCIES = 2e-6  # relative: a few last bits
# In bf16: so many times the error that transformers' own bf16 run has, and so much of the largest logit.
_TIMES, _FLOOR = 2.0, 1e-3


@dataclass(frozen=True)
class Differences:
    """Of logits from transformers' in fp32. kl: mean over tokens of KL(transformers || these), in nats."""

    max_difference: float
    mean_difference: float
    kl: float
    top1_agreement: float

    @classmethod
    def between(cls, found: Tensor, expected: Tensor) -> "Differences":
        """found, expected: fp32 [B, T, V] on one device."""
        pairs = zip(found.flatten(0, 1).split(_TOKENS), expected.flatten(0, 1).split(_TOKENS), strict=True)
        tokens = torch.cat([_by_token(ours, theirs) for ours, theirs in pairs], 1)
        mean, kl, same = tokens[1:].mean(1).tolist()
        return cls(tokens[0].max().item(), mean, kl, same)


def _by_token(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of logits [N, V]: largest and mean difference, KL divergence, the same likeliest token; fp64 [4, N]."""
    difference = (ours - theirs).abs()
    p, q = (t.double().log_softmax(-1) for t in (theirs, ours))
    kl = (p.exp() * (p - q)).sum(-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    return torch.stack([difference.amax(-1).double(), difference.double().mean(-1), kl, same.double()])


@dataclass(frozen=True)
class Report:
    """What a check found. Differences are absolute; scale: the largest logit.

    frequencies: largest relative difference of the rotary frequencies and of their cosines' factor.
    transformers_bf16: of transformers' own bf16 run; None where ours is in fp32. bounds: by name.
    """

    dtype: str
    tokens: int
    scale: float
    max_difference: float
    mean_difference: float
    kl: float
    top1_agreement: float
    frequencies: float
    bounds: Mapping[str, float]
    transformers_bf16: Differences | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def failures(self) -> Iterator[str]:
        """What is beyond its bound."""
        for name, bound in self.bounds.items():
            value = getattr(self, name)
            if not value <= bound:  # a NaN is beyond every bound
                yield f"{name} {value:.3g} is above {bound:.3g}"

    def __str__(self) -> str:
        by = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        failed = list(self.failures())
        lines = [
            f"logits against transformers ({self.dtype}, {self.tokens} tokens): "
            + ("NOT the same: " + "; ".join(failed) if failed else "the same"),
            f"  largest difference {self.max_difference:.3g} (at most {self.bounds['max_difference']:.3g}), "
            f"mean {self.mean_difference:.3g}; the largest logit is {self.scale:.4g}",
            f"  KL divergence {self.kl:.3g} (at most {self.bounds['kl']:.3g}), the same likeliest token in "
            f"{self.top1_agreement:.1%}",
            f"  rotary frequencies differ by {self.frequencies:.1g} (at most {_FREQUENCIES:.1g})",
            f"  {by}",
        ]
        if self.transformers_bf16 is not None:
            theirs = self.transformers_bf16
            lines.insert(
                3,
                f"  transformers' own bf16 run: largest difference {theirs.max_difference:.3g}, mean "
                f"{theirs.mean_difference:.3g}, KL divergence {theirs.kl:.3g}",
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """As it is stored in verification.json."""
        return json.dumps({"passed": not list(self.failures()), **asdict(self)}, indent=2) + "\n"


def verify_on_mesh(gpt: GPT, axes: Axes, checkpoint: HFCheckpoint, dtype: str) -> Report:
    """Holds the model as it was loaded on this mesh against the checkpoint; on all ranks.

    Rank 0 computes transformers' logits on its device, a layer at a time. What the run has changed in the
    model (its rotary embedding) is changed there too. dtype: of the mesh, fp32 or bf16.

    Raises:
        ValueError: beyond the bound; the message is the report.
    """
    step = math.lcm(2 * axes.sequence.size, axes.sequence.size * axes.tp.size)
    ids = fixed_ids(gpt.config.vocab_size, -(-LENGTH // step) * step)
    found = logits(gpt, axes, ids)
    box: list[Report | None] = [None]

    def compare() -> None:
        config = config_of(gpt.config, checkpoint.config)
        reference = Reference(config, HFSource(checkpoint), axes.device)
        box[0] = report(found, ids, reference, gpt.config, dtype)

    on_first_rank(compare)
    dist.broadcast_object_list(box, src=0)
    (result,) = box
    assert result is not None
    return passed(result)


def verify_alone(
    ours: TensorSource,
    model: ModelConfig,
    theirs: TensorSource,
    config: Mapping[str, Any],
    device: torch.device,
) -> Report:
    """Holds our model on the weights of `ours` against transformers' on those of `theirs`; in fp32.

    config: the config.json that goes with `theirs`.

    Raises:
        ValueError: beyond the bound; the message is the report.
    """
    ids = fixed_ids(model.vocab_size, LENGTH)
    found = logits_alone(ours, model, ids, device)
    return passed(report(found, ids, Reference(config, theirs, device), model, "fp32"))


def fixed_ids(vocab_size: int, length: int) -> Tensor:
    """The inputs of every check: int64 [2, T]."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(0, vocab_size, (SAMPLES, length), generator=generator)


def passed(found: Report) -> Report:
    """The report, if nothing in it is beyond its bound.

    Raises:
        ValueError: something is.
    """
    if list(found.failures()):
        raise ValueError(
            f"the check of the conversion failed\n{found}\nthe weights or options are not computed as "
            "transformers does, so nothing may be built on them; --no-verify (finetune.verify=false) goes on "
            "all the same"
        )
    return found


def report(found: Tensor, ids: Tensor, reference: Reference, model: ModelConfig, dtype: str) -> Report:
    """Compares our logits of `ids` with the reference's. dtype: in which ours were computed."""
    import transformers

    expected = reference.logits(ids, torch.float32)
    found = found.to(expected.device)
    scale = expected.abs().max().item()
    theirs = None
    if dtype == "fp32":
        bounds = {"max_difference": _FP32_DIFFERENCE * scale, "kl": _FP32_KL}
    else:
        theirs = Differences.between(reference.logits(ids, torch.bfloat16), expected)
        bounds = {
            "max_difference": _TIMES * theirs.max_difference + _FLOOR * scale,
            "mean_difference": _TIMES * theirs.mean_difference + _FLOOR * scale,
            # It grows with the square of the differences.
            "kl": _TIMES**2 * theirs.kl + _FP32_KL,
        }
    versions = {"megatsp": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return Report(
        dtype,
        ids.numel(),
        scale,
        **asdict(Differences.between(found, expected)),
        frequencies=_frequencies(model, reference.rotary),
        bounds={**bounds, "frequencies": _FREQUENCIES},
        transformers_bf16=theirs,
        versions=versions,
    )


def _frequencies(model: ModelConfig, rotary: Any) -> float:
    """The largest relative difference of our rotary embedding from transformers'.

    Short inputs do not see it: low frequencies, which are the ones that are scaled, hardly turn in them.
    """
    theirs = rotary.inv_freq.double().cpu()
    ours = inverse_frequencies(model).double().cpu()
    if ours.shape != theirs.shape:
        return math.inf
    factor = rotary_table(model, torch.zeros(1, dtype=torch.int64))[0].double()  # the cosine of 0, times it
    wrong = [((ours - theirs) / theirs).abs().max(), (factor / rotary.attention_scaling - 1).abs().max()]
    return max(w.item() for w in wrong)
