"""Peak bytes per rank for D = 1, 2, 4, 8 at a fixed sequence: real ranks, two training steps each.

    python scripts/bench/memory.py --hidden 256 --layers 4 --seq-length 4096

Starts each D's ranks on this machine's CPU and follows every tensor that is alive on them (see
megatsp/training/live_bytes.py). The parts are those at the moment of the peak, on the rank with the
largest; beside them what is alive after a forward and what gradients are after a backward. What
megatsp.training.memory predicts (state: weights, gradients, optimizer) leaves out the working
memory of the layer being computed.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatsp import __version__, launcher
from megatsp.axes import Axes, join
from megatsp.model.gpt import count_parameters
from megatsp.model.parallelize import build_model
from megatsp.schema import Config, ModelConfig, ParallelConfig, TrainerConfig
from megatsp.training.live_bytes import KINDS, LiveBytes
from megatsp.training.memory import predict
from megatsp.training.optimizer import AdamW, clip_gradients
from megatsp.tsp.partition import take_local
from megatsp.validate import validate

STEPS = 2
MIB = 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hidden", type=int, default=256, help="residual width h (default: 256)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: 4)")
    parser.add_argument("--head-width", type=int, default=32, help="width d of a head (default: 32)")
    parser.add_argument("--vocab", type=int, default=4096, help="vocabulary (default: 4096)")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of the sequence (default: 4096)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--layout", choices=("hidden", "owner"), default="hidden")
    parser.add_argument("--exchange", choices=("allgather", "ring"), default="allgather")
    parser.add_argument("--buckets", type=int, default=0, help="of every part; 0: max(2, D) (default: 0)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="values of D")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # a rank's: where the first writes
    return parser.parse_args()


def configuration(given: argparse.Namespace, tsp: int) -> Config:
    heads, rest = divmod(given.hidden, given.head_width)
    if rest:
        raise SystemExit(f"--hidden {given.hidden}: --head-width {given.head_width} must divide it")
    model = ModelConfig(
        num_layers=given.layers,
        hidden_size=given.hidden,
        ffn_hidden_size=4 * given.hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=given.head_width,
        vocab_size=given.vocab,
    )
    trainer = TrainerConfig(
        seq_length=given.seq_length,
        micro_batch_size=1,
        global_batch_size=1,
        dtype=given.dtype,
        recompute_granularity=given.recompute,
    )
    parallel = ParallelConfig(
        tsp=tsp,
        tsp_layout=given.layout,
        kv_exchange=given.exchange,
        attention_buckets=given.buckets,
        mlp_buckets=given.buckets,
        head_buckets=given.buckets,
    )
    return validate(Config(model=model, parallel=parallel, trainer=trainer), world_size=tsp)


def rank_work(given: argparse.Namespace) -> int:
    """On a rank: two training steps; the first rank writes the bytes of the rank with the largest peak."""
    join(torch.device("cpu"), timeout_s=600)
    config = configuration(given, dist.get_world_size())
    axes = Axes.build(config.parallel, torch.device("cpu"))
    with LiveBytes() as live:
        gpt = build_model(config, axes)
        optimizer = AdamW(gpt, config.optimizer)
        live.hold_model(gpt)
        live.hold("optimizer", optimizer.tensors().values())
        live.start_again()
        ids = torch.arange(given.seq_length)[None] % given.vocab
        ids = take_local(ids, axes.tsp.rank, axes.tsp.size)
        mask = torch.full(ids.shape, 1 / given.seq_length)
        saved = gradients = 0
        for _ in range(STEPS):
            loss = gpt(ids, ids, mask).sum()
            saved = max(saved, live.live["other"])
            loss.backward()
            del loss
            gradients = max(gradients, live.live["gradients"])
            clip_gradients(gpt, config.optimizer.clip_grad)
            optimizer.step(config.optimizer.lr)
    found = {kind: live.peak[kind] for kind in KINDS}
    found |= {"total": live.peak.total(), "after_forward": saved, "after_backward": gradients}
    everywhere: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    if dist.get_rank() == 0:
        given.result.write_text(json.dumps(max(everywhere, key=lambda of_rank: of_rank["total"])))
    dist.destroy_process_group()
    return 0


def measure(given: argparse.Namespace, tsp: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        status = launcher.launch_local(
            tsp, [sys.executable, __file__, *sys.argv[1:], "--result", str(result)]
        )
        if status:
            sys.exit(status)
        measured = json.loads(result.read_text())
    predicted = predict(configuration(given, tsp))
    return {"tsp": tsp, "measured": measured, "predicted": {**asdict(predicted), "total": predicted.total}}


def table(found: list[dict]) -> str:
    """Markdown; MiB, and in brackets the ratio to the first row."""
    columns = (*KINDS, "total", "after_forward", "after_backward")
    first = found[0]["measured"]
    lines = [
        "| D | weights | gradients | optimizer | activations, buffers | peak | activations after forward "
        "| gradients after backward | predicted state | predicted saved + buckets | predicted total |",
        "|" + "--:|" * 11,
    ]
    for row in found:
        measured, predicted = row["measured"], row["predicted"]
        cells = [
            f"{measured[c] / MIB:.1f}" + (f" ({measured[c] / first[c]:.3f})" if first[c] > MIB / 10 else "")
            for c in columns
        ]
        state = predicted["weights"] + predicted["gradients"] + predicted["optimizer"]
        rest = predicted["saved_activations"] + predicted["buckets"]
        cells += [f"{n / MIB:.1f}" for n in (state, rest, predicted["total"])]
        lines.append(f"| {row['tsp']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    given = parse()
    if given.result:
        launcher.run_rank(lambda: rank_work(given))
    for tsp in given.ranks:
        configuration(given, tsp)  # what cannot run is refused before anything starts
    found = [measure(given, tsp) for tsp in given.ranks]
    if given.json:
        print(json.dumps({"arguments": vars(given) | {"result": None}, "ranks": found}))
        return 0
    config = configuration(given, given.ranks[0])
    print(
        f"{count_parameters(config.model):,} parameters, {given.seq_length} tokens, {given.dtype}, ", end=""
    )
    print(f"recompute {given.recompute}, layout {given.layout}, exchange {given.exchange}, {STEPS} steps")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, megatsp {__version__}")
    print(f"MiB per rank (ratio to D={given.ranks[0]})\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
