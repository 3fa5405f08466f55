"""Continues a text with a trained model, on the tsp axis it is given.

There is no key/value cache: every token costs a forward pass over the text so far, at most the
length that the model was trained at.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.axes import Axes, choose_device, join
from megatsp.checkpoint import paths, store
from megatsp.checkpoint.manifest import check_folder
from megatsp.compose import from_yaml
from megatsp.data.tokenizer import Tokenizer
from megatsp.model.gpt import GPT, local
from megatsp.model.parallelize import build_model
from megatsp.schema import ParallelConfig
from megatsp.training.base import load_base
from megatsp.tsp.norm import rms_norm
from megatsp.tsp.partition import local_positions, take_local
from megatsp.validate import validate


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
) -> str:
    """The prompt and up to `tokens` more, sampled at `temperature` (0: the likeliest), to the first eod.

    context: most tokens that the model looks back on. The seed decides, not the size of the mesh.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    start = len(ids)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        # An embedding may have more rows than there are tokens.
        logits = next_token_logits(gpt, axes, ids[-context:]).cpu()[: tokenizer.vocab_size]
        if temperature == 0:
            token = logits.argmax()
        else:
            token = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)[0]
        token = token.to(axes.device)
        dist.broadcast(token, src=0)  # one choice, should logits differ in a last bit
        gpt.engine.check()
        if token.item() == tokenizer.eod:
            break
        ids.append(int(token.item()))
    return prompt + tokenizer.decode(ids[start:])


@torch.no_grad()
def next_token_logits(gpt: GPT, axes: Axes, ids: list[int]) -> Tensor:
    """Logits of the token after `ids`: fp32 [V], the same on all ranks.

    The sequence is padded to a multiple of 2D; what follows a token cannot change it.
    """
    comm, count = axes.tsp, len(ids)
    length = -(-count // (2 * comm.size)) * 2 * comm.size
    padded = torch.tensor([ids + [0] * (length - count)], device=axes.device)
    x = gpt(take_local(padded, comm.rank, comm.size))
    is_last = local_positions(length, comm.rank, comm.size, axes.device) == count - 1
    last = comm.all_reduce((x[0] * is_last[:, None]).sum(0), "generate").wait()
    gain = gpt.engine.head.small.gains([local(gpt.model.norm.weight)])[0]
    normed = rms_norm(last, gain, gpt.config.norm_epsilon).float()
    # Each rank has its columns of the head: partial logits, summed over the group.
    weight = local(gpt.head_weight).float()
    mine = normed.chunk(comm.size)[comm.rank]
    return comm.all_reduce(weight @ mine, "generate").wait()
