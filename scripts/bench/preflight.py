"""`megatsp preflight` on all GPUs of this machine, a rank each: fails unless all data was right.

    python scripts/bench/preflight.py --json preflight.json
    python scripts/bench/preflight.py --smoke                   # two ranks and a tiny model on the CPU

Speeds are shown and judged by nobody: what is to be tried here is the program, on a device.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatsp.bench.table import align
from megatsp.parser import Parser

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("model=gpt_1b", "trainer.seq_length=8192", "trainer.dtype=bf16", "launch.device=cuda")
TINY = ("model=gpt_tiny", "trainer.seq_length=64", "launch.device=cpu")


def main(arguments: list[str]) -> int:
    """Returns 1 if data was wrong or the preflight failed, 2 if the arguments make no sense."""
    parser = Parser("preflight.py", "The preflight of all GPUs of this machine.")
    parser.add_argument("--smoke", action="store_true", help="two ranks and a tiny model on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    try:
        given = parser.parse_args(arguments)
        if not given.smoke and not torch.cuda.is_available():
            raise ValueError("it measures GPUs, and torch sees none (--smoke tries the program)")
        if importlib.util.find_spec("hydra") is None:
            raise ValueError("megatsp preflight needs hydra-core, which is not installed here")
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 2
    ranks = 2 if given.smoke else torch.cuda.device_count()
    command = [sys.executable, "-m", "megatsp", "preflight", "--json", "--slow=warn", *overrides(ranks)]
    ran = subprocess.run(
        [*command, *(TINY if given.smoke else MODEL)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if not ran.stdout.startswith("{"):
        print(f"preflight: it exited with {ran.returncode} before it had measured anything", file=sys.stderr)
        return 1
    report = json.loads(ran.stdout)
    page = render(report)
    for file, text in ((given.json, ran.stdout), (given.markdown, page)):
        if file is not None:
            file.write_text(text)
    print(page)
    wrong = [m["what"] for m in report["measurements"] if not all(s["right"] for s in m["measured"])]
    if wrong:
        print(f"preflight: wrong data: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong or ran.returncode else 0


def overrides(ranks: int) -> Sequence[str]:
    """Weights over pairs of ranks, if they are even in number, and FSDP over the pairs: transfers of both."""
    tsp = 2 - ranks % 2
    samples = f"trainer.global_batch_size={ranks // tsp}"
    return (
        f"launch.nproc={ranks}", f"parallel.tsp={tsp}", f"parallel.dp_shard={ranks // tsp}",
        "trainer.micro_batch_size=1", samples,
    )  # fmt: skip


def render(report: Mapping[str, Any]) -> str:
    """What was measured, as a table; then what the preflight says of it."""
    lines = []
    for m in report["measurements"]:
        values, right = [s["value"] for s in m["measured"]], all(s["right"] for s in m["measured"])
        size = f"{m['bytes'] / 2**20:.4g}" if m["bytes"] else ""
        lines.append([m["what"], size, f"{min(values):.4g}", m["unit"], "right" if right else "WRONG"])
    told = [
        *report["warnings"],
        *(f"{node}: {reason}" for node, all_ in report["bad"].items() for reason in all_),
    ]
    table = align(["what", "MiB", "lowest", "unit", "data"], lines)
    return "\n".join([table, "", *(f"- {text}" for text in told)]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
