"""What `--dry-run` says of a configuration, computed without starting a rank."""

from megatsp.model.gpt import count_parameters
from megatsp.schema import Config
from megatsp.training.memory import predict
from megatsp.validate import dp_size


def describe(config: Config, world_size: int) -> str:
    """Mesh, parameter count and predicted bytes per rank of a validated configuration."""
    parallel, trainer, model = config.parallel, config.trainer, config.model
    held = predict(config)
    accumulation = trainer.global_batch_size // (trainer.micro_batch_size * dp_size(config))
    buckets = (parallel.attention_buckets, parallel.mlp_buckets, parallel.head_buckets)
    rows = [
        ("world", f"{world_size} ranks"),
        ("mesh", f"dp_replicate {parallel.dp_replicate} x dp_shard {parallel.dp_shard} x tsp {parallel.tsp}"),
        ("layout", f"{parallel.tsp_layout}, keys and values by {parallel.kv_exchange}"),
        ("buckets", "attention {}, MLP {}, head {}".format(*buckets)),
        ("tokens per rank", f"{trainer.micro_batch_size} x {trainer.seq_length // parallel.tsp:,}"),
        ("micro-batches", f"{accumulation} a step"),
        ("parameters", f"{count_parameters(model):,}"),
        ("bytes per rank", "(predicted)"),
        ("  weights", _bytes(held.weights)),
        ("  gradients", _bytes(held.gradients)),
        ("  optimizer", _bytes(held.optimizer)),
        ("  activations", f"{_bytes(held.saved_activations)} kept for the backward"),
        ("  two buckets", _bytes(held.buckets)),
        ("  sum", f"{_bytes(held.total)} and the working memory of one layer"),
    ]  # fmt: skip
    return "\n".join(f"{name:16} {text}" for name, text in rows)


def _bytes(count: int) -> str:
    return f"{count:,} ({count / 2**30:.2f} GiB)"
