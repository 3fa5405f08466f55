"""Continues a text with a trained model, on the mesh it is given.

There is no key/value cache: every token costs a forward pass over the text so far, at most the
length that the model was trained at.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatsp.axes import Axes, choose_device, join
from megatsp.checkpoint import paths, store
from megatsp.checkpoint.manifest import check_folder
from megatsp.comm import Comm
from megatsp.compose import from_yaml
from megatsp.data.tokenizer import Tokenizer
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import build_model, reshard, share
from megatsp.schema import ParallelConfig
from megatsp.training.base import load_base
from megatsp.tsp.norm import rms_norm
from megatsp.validate import validate

_NONE = -1  # instead of a token: there is none to be chosen


class NotFinite(ValueError):
    """A model gives no next token."""


def main(
    run_folder: Path, which: str, base: str, prompt: str, tokens: int, temperature: float, seed: int
) -> None:
    """Prints the prompt and its continuation by a checkpoint of the run; on all ranks of a tsp group.

    which: last, best or an iteration. Adapters are added to the checkpoint that they tune; base: where that
    is, empty: where it was.

    Raises:
        ValueError: the folder holds no such checkpoint, what it tunes has changed, its tokenizer is not the
            one that it was trained with, or its model does not split over these ranks.
    """
    checkpoints = run_folder / "checkpoints"
    if which == "last" and paths.latest(checkpoints) is None:
        raise ValueError(f"{run_folder} has no checkpoint: train it first, or give another run's folder")
    found = paths.chosen(checkpoints, which)
    check_folder(found)  # loading checks the large files
    config = from_yaml((found / "config.yaml").read_text())
    if base:
        if not config.finetune.lora_rank:
            raise ValueError(f"--base {base}: {found} has no adapters, its weights are whole; leave it out")
        config = replace(config, finetune=replace(config.finetune, hf=base))
    tokenizer = store.load_tokenizer_of(found, config.data.tokenizer)
    device = choose_device(config.launch.device)
    join(device, config.launch.timeout_s)
    try:
        parallel = ParallelConfig(tsp=dist.get_world_size())
        config = validate(replace(config, parallel=parallel), dist.get_world_size())
        axes = Axes.build(config.parallel, device)
        gpt = build_model(config, axes)
        if config.finetune.lora_rank:  # the checkpoint holds adapters alone
            load_base(config, found, gpt)
        store.load(found, gpt, {})
        text = generate(gpt, axes, tokenizer, prompt, tokens, temperature, seed, config.trainer.seq_length)
        if dist.get_rank() == 0:
            print(text, flush=True)
        gpt.engine.close()
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def generate(
    gpt: GPT,
    axes: Axes,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    context: int,
    before_token: Callable[[], object] = lambda: None,
) -> str:
    """The prompt and up to `tokens` more, sampled at `temperature` (0: the likeliest), to the first eod.

    context: most tokens that the model looks back on. The seed decides, not the size of the mesh.

    Raises:
        NotFinite: the model gives logits that are not finite.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    start = len(ids)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        before_token()
        # An embedding may have more rows than there are tokens.
        logits = next_token_logits(gpt, axes, ids[-context:]).cpu()[: tokenizer.vocab_size]
        if not logits.isfinite().all():
            token = torch.tensor(_NONE)
        elif temperature == 0:
            token = logits.argmax()
        else:
            token = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)[0]
        token = token.to(axes.device)
        dist.broadcast(token, src=0)  # one choice, should logits differ in a last bit
        gpt.engine.check()
        if token.item() == _NONE:
            raise NotFinite(
                "the model's logits are not finite: its weights have diverged; use an earlier checkpoint"
            )
        if token.item() == tokenizer.eod:
            break
        ids.append(int(token.item()))
    return prompt + tokenizer.decode(ids[start:])


@torch.no_grad()
def next_token_logits(gpt: GPT, axes: Axes, ids: list[int]) -> Tensor:
    """Logits of the token after `ids`: fp32 [V], the same on all ranks, on any mesh.

    The sequence is padded until it splits over the mesh; what follows a token cannot change it.
    """
    count, ranks = len(ids), axes.sequence.size
    multiple = ranks * math.lcm(2, axes.tp.size)
    length = -(-count // multiple) * multiple
    padded = torch.tensor([ids + [0] * (length - count)], device=axes.device)
    x = gpt(axes.take_local(padded))
    reshard(gpt)  # back to fp32: FSDP shows the compute dtype's copies while a module is gathered
    is_last = axes.take_local(torch.arange(length, device=axes.device)[None])[0] == count - 1
    last = (x[0] * is_last[:, None]).sum(0)
    for comm in (axes.sequence, axes.tp):
        last = comm.all_reduce(last, "generate").wait()
    gain = gpt.model.norm.weight
    assert isinstance(gain, DTensor)
    normed = rms_norm(last, gain.full_tensor(), gpt.config.norm_epsilon).float()
    return _head_logits(gpt.head_weight, normed, axes)


def _head_logits(head: Tensor, normed: Tensor, axes: Axes) -> Tensor:
    """head [V, h] times normed [h]: each rank's piece of the matrix gives a part, summed over the mesh."""
    assert isinstance(head, DTensor)
    rows, columns = [0, head.shape[0]], [0, head.shape[1]]
    # Cut over tsp or tp, and what that left by FSDP: those are the mesh's last dims, innermost last.
    names = ("model", "shard")
    for name, placement in zip(names, reversed(head.placements), strict=False):
        if placement.is_replicate():
            continue
        span = rows if placement.dim == 0 else columns  # type: ignore[attr-defined]  # a shard
        start, stop = share(span[1] - span[0], axes.weights.get_local_rank(name), axes.weights[name].size())
        span[:] = span[0] + start, span[0] + stop
    logits = normed.new_zeros(head.shape[0])
    logits[slice(*rows)] = head.to_local().float() @ normed[slice(*columns)]
    for name in names:
        logits = Comm(axes.weights.get_group(name), axes.traffic).all_reduce(logits, "generate").wait()
    return logits
