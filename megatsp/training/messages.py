"""What a run says beside its metrics: at its start, and of a loss that cannot be right."""

from collections.abc import Iterator

import torch.distributed as dist

from megatsp.axes import Axes
from megatsp.checkpoint.state import RunState
from megatsp.data.blend import Blend, Draw
from megatsp.data.loader import Share, next_draws
from megatsp.data.splits import Splits
from megatsp.kernels import resolve
from megatsp.model.gpt import GPT
from megatsp.schema import Config
from megatsp.training.folder import run_folder
from megatsp.training.gradients import Computed


def greeting(config: Config, axes: Axes, gpt: GPT, start: int) -> str:
    """Where the run stands after iteration `start`, and what computes it."""
    shape = dict(zip(axes.mesh.mesh_dim_names or (), axes.mesh.shape, strict=True))
    parameters = sum(p.numel() for p in gpt.parameters())
    mesh = " x ".join(f"{name} {size}" for name, size in shape.items())
    begun = f"resumed after iteration {start}" if start else "new run"
    device = axes.device
    kernels = ", ".join(f"{k} {v}" for k, v in resolve(config.kernels, device).items())
    sizes = f"{parameters:,} parameters on {mesh} ({device.type})"
    return f"{run_folder(config)}: {begun}; {sizes}\nkernels: {kernels}"


def transfers(overlap: str) -> str:
    """How weights travel over tsp, as the log says it: each group has chosen for itself."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, overlap)
    kinds = dict.fromkeys(found)
    if len(kinds) == 1:
        return f"weights over tsp travel {overlap}"
    ranks = {kind: ", ".join(str(rank) for rank, own in enumerate(found) if own == kind) for kind in kinds}
    return "\n".join(f"weights over tsp travel {kind} (ranks {ranks[kind]})" for kind in kinds)


def source_lines(config: Config, data: Splits) -> Iterator[str]:
    """What the log says of the data: sources, weights, and how often this run reads them."""
    settings = config.trainer
    samples = settings.train_iters * settings.global_batch_size
    for source in data.train.sources:
        yield (
            f"data: {source.name}: {source.weight:.1%} of the samples, {len(source.samples):,} an epoch, "
            f"{source.epochs(samples):.3g} epochs in {settings.train_iters} iterations"
        )
        if any(shard.info is None for shard in source.samples.corpus.shards):
            yield f"data: {source.name} does not say which tokenizer made it: that is not checked"
    if data.valid is None:
        yield "data: no validation split (data.valid_fraction=0): there is no validation loss"


def blame(train: Blend, share: Share, state: RunState, computed: Computed, done: str) -> str:
    """What to say of a step's loss that cannot be right: the iteration and the batch's documents.

    state: before the step. done: what became of the step. On all ranks.
    """
    size = share.global_batch_size
    draws, _ = next_draws(train, state.consumed_samples, size, state.skipped_samples)
    finite: dict[Draw, bool] = {}
    for chosen, sample_losses in zip(share.micro_batches(draws), computed.losses, strict=True):
        finite |= {draw: bool(own.isfinite()) for draw, own in zip(chosen, sample_losses, strict=True)}
    everywhere: list[dict[Draw, bool]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, finite)
    bad = [draw for draw in draws if not all(known.get(draw, True) for known in everywhere)]
    names = list(dict.fromkeys(name for draw in bad or draws for name in train.names(draw)))
    return (
        f"iteration {state.iteration + 1}: loss {computed.loss}, gradient norm {computed.grad_norm}; "
        f"{done}.\n"
        f"Documents of {'the samples whose loss is not finite' if bad else 'the batch'}: "
        f"{', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
    )


def advice(saved_at: int) -> str:
    """What to do about it, once the run ends."""
    return (
        "Look at them, lower optimizer.lr or set optimizer.clip_grad; the last checkpoint is of "
        f"iteration {saved_at}" + ("" if saved_at else ", that is none")
    )
