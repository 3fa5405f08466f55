"""The page: one HTML file without a script, a font or an address outside itself.

All that comes from a run, its name, prompts, events, is escaped in `_cell` and `_text`; nothing else puts
text into the page.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from megatsp import __version__
from megatsp.report.curves import PLOTS, drawings
from megatsp.report.sources import Entry, Run
from megatsp.schema import AXES

_MOST_ROWS = 200  # of a table: the newest

_SETTINGS = (
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads",
    "model.num_query_groups", "model.vocab_size", "data.path", "data.tokenizer", "data.packing",
    "trainer.seq_length", "trainer.global_batch_size", "trainer.micro_batch_size", "trainer.train_iters",
    "trainer.dtype", "trainer.recompute_granularity", "trainer.seed", "optimizer.name", "optimizer.lr",
    "optimizer.weight_decay", "optimizer.clip_grad", "scheduler.lr_decay_style", "scheduler.lr_warmup_iters",
    "scheduler.min_lr", "parallel.tsp_layout", "parallel.kv_exchange", "parallel.overlap",
    "checkpoint.save_interval", "finetune.hf", "finetune.lora_rank",
)  # fmt: skip
_LATEST = (
    ("lm loss", "loss", ".4f"), ("val/lm loss", "validation loss", ".4f"),
    ("val/bits-per-byte", "bits per byte", ".4f"), ("tokens/s/gpu", "tokens/s per GPU", ",.0f"),
    ("tflops/gpu", "TFLOP/s per GPU", ",.1f"), ("mfu", "MFU", ".1%"), ("memory/peak-gib", "GiB peak", ".1f"),
    ("skipped-steps", "skipped steps", ",d"), ("loss-spikes", "spikes", ",d"),
)  # fmt: skip
METRICS = frozenset(  # what the page shows
    [
        "consumed-tokens",
        *(name for plot in PLOTS for name, _ in plot.names),
        *(name for name, _, _ in _LATEST),
    ]
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 0 auto;
  max-width: 72rem; padding: 1rem; }
h1 { margin: 0; overflow-wrap: anywhere; } h2 { margin: 2rem 0 .5rem; }
.note { color: #57606a; }
.numbers, .plots { display: flex; flex-wrap: wrap; gap: .75rem; }
.plots figure { flex: 1 1 20rem; max-width: 34rem; }
.numbers div { border: 1px solid #d1d9e0; border-radius: 6px; padding: .4rem .6rem;
  flex: 0 1 8rem; }
.numbers b { display: block; font-size: 1.2rem; }
figure { margin: 0; } figcaption { font-weight: 600; } img { width: 100%; height: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
td, th { border-bottom: 1px solid #d1d9e0; padding: .25rem .75rem .25rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; white-space: pre-wrap; min-width: 4.5rem; }
td:first-child { white-space: nowrap; }
.WARN { color: #9a6700; } .ERROR { color: #cf222e; font-weight: 600; }
"""
_LEVELS = {
    "spike": "WARN", "not finite": "WARN", "rollback": "WARN", "save failed": "WARN", "other bits": "WARN",
    "failed": "ERROR", "attempt failed": "ERROR", "hang": "ERROR", "hardware": "ERROR", "not saved": "ERROR",
}  # fmt: skip


def page(run: Run) -> str:
    """The whole file."""
    plots = "".join(
        f'<figure><figcaption>{_text(title)}</figcaption><img alt="{_text(title)}" src="{uri}"></figure>'
        for title, uri in drawings(run.metrics, run.checkpoints)
    )
    sections = [
        ("Curves", plots and f'<p class="note">Triangles: checkpoints.</p><div class="plots">{plots}</div>'),
        ("Mesh", _table(("axis", "ranks"), _mesh(run))),
        ("Settings", _table(("key", "value"), _settings(run))),
        ("Attempts", _table(_ATTEMPT, (_attempt(attempt) for attempt in run.attempts))),
        ("Events", _events(run.events)),
        ("Checkpoints", _checkpoints(run)),
        ("Samples", _samples(run.samples)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    whole = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{_text(run.name)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(run.name)}</h1>{_summary(run)}{body}</body></html>\n"
    )
    return whole.encode(errors="replace").decode()  # half of a character, from a text that was cut


_TIMES = ("started", "ended")
_ATTEMPT = ("job_id", "attempt", "restart", "nodes", "started", "ended", "status", "cause", "action", "why")


def _clock(stamp: Any) -> str:
    """A time.time() as a date; "" where there is none."""
    if not isinstance(stamp, (int, float)) or not stamp:
        return ""
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _attempt(attempt: Entry) -> list[Any]:
    """A job's attempt as a row; the time of an end that is not there yet is 0."""
    return [_clock(attempt.get(name)) if name in _TIMES else attempt.get(name, "") for name in _ATTEMPT]


def _text(value: Any) -> str:
    """Anything of a run's as text in HTML or in an attribute."""
    return escape(str(value), quote=True)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return f"<td>{_text(value)}</td>"


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Empty if there is no row; of very many the last ones."""
    cells = ["".join(map(_cell, row)) for row in rows]
    if not cells:
        return ""
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(f"<tr>{row}</tr>" for row in cells[-_MOST_ROWS:])
    left_out = len(cells) - _MOST_ROWS
    note = f'<p class="note">{left_out} older ones are left out.</p>' if left_out > 0 else ""
    return f'{note}<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def _summary(run: Run) -> str:
    last = run.metrics[-1]["iteration"] if run.metrics else 0
    total = run.settings.get("trainer.train_iters", "?")
    ends = [event for event in run.events if event.get("kind") not in ("saved", "spike", "not finite")]
    state = f"; last event: {_text(ends[-1].get('kind', ''))}" if ends else ""
    wandb = f"; W&amp;B run {_text(run.wandb_id)}" if run.wandb_id else ""
    note = (
        f'<p class="note">iteration {last} of {_text(total)}{state}{wandb}; '
        f"{_text(f'metrics of {run.changed}' if run.changed else 'nothing was logged yet')}; "
        f"{_text(run.folder)}; megatsp {__version__}</p>"
    )
    numbers = []
    for name, label, form in _LATEST:
        if (value := next((e[name] for e in reversed(run.metrics) if name in e), None)) is not None:
            shown = format(int(value) if form.endswith("d") else value, form)
            numbers.append(f"<div><b>{_text(shown)}</b>{_text(label)}</div>")
    return f'{note}<div class="numbers">{"".join(numbers)}</div>'


def _mesh(run: Run) -> list[tuple[str, Any]]:
    return [(axis, size) for axis in AXES if (size := run.settings.get(f"parallel.{axis}")) is not None]


def _settings(run: Run) -> list[tuple[str, Any]]:
    names = (n for n in _SETTINGS if run.settings.get("finetune.hf") or not n.startswith("finetune."))
    return [(name, run.settings[name]) for name in names if run.settings.get(name) not in (None, "")]


def _events(events: Sequence[Entry]) -> str:
    """All but saves, which the checkpoints show; a colour for what went wrong."""
    table = _table(
        ("time", "iteration", "kind", "text"),
        (
            [event.get(name, "") for name in ("time", "iteration", "kind", "text")]
            for event in events
            if event.get("kind") != "saved"
        ),
    )
    for kind, level in _LEVELS.items():
        table = table.replace(f"<td>{kind}</td>", f'<td class="{level}">{kind}</td>')
    return table


def _checkpoints(run: Run) -> str:
    if not run.checkpoints:
        return '<p class="note">none yet</p>'
    return f"<p>{', '.join(map(str, run.checkpoints))}</p>"


def _samples(samples: Sequence[Entry]) -> str:
    names = ("iteration", "prompt", "continuation")
    return _table(names, ([sample.get(name, "") for name in names] for sample in samples))
