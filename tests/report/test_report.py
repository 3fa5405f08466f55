"""`megatsp report`: one file that holds all of a run, and nothing that a run wrote is code in it."""

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from runs import ROOT, overrides, train_on_ranks, write_corpus
from waiting import LIMIT_S

from megatsp import cli
from megatsp.compose import compose, to_yaml
from megatsp.report.curves import drawings, thinned

EVIL = "</td><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>\"'&"
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "b", "figure", "figcaption",
    "img", "table", "tr", "th", "td",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page, and its images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.images: dict[str, bytes] = {}
        self.text: list[str] = []
        self.feed(text)
        self.shown = "\n".join(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        named = {name: value or "" for name, value in attributes}
        self.attributes |= named.keys()
        if tag == "img":
            kind, _, content = named["src"].partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.images[named["alt"]] = base64.b64decode(content)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def write_lines(path: Path, *entries: dict, tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)


def make_run(folder: Path, word: str = "plain", tail: str = "") -> Path:
    """A run's folder with everything in it, `word` wherever a run writes text."""
    config = compose(["name=big", "trainer.train_iters=300", "parallel.tsp=8"])
    folder.mkdir()
    text = to_yaml(config).replace("name: big", f"name: {json.dumps(word)}")
    (folder / "config.yaml").write_text(text.replace("tokenizer: byte", f"tokenizer: {json.dumps(word)}"))
    entries = [
        {"iteration": i, "consumed-tokens": 1000 * i, "lm loss": 9 - i / 50, "learning-rate": 1e-4,
         "grad-norm": 1.5, "tokens/s/gpu": 900.0, "tflops/gpu": 4.0, "mfu": None, "memory/peak-gib": 2.0,
         "comm/exposed-ms": 3.0, "iteration-time-ms": 30.0}
        for i in range(1, 200)
    ]  # fmt: skip
    entries.insert(100, {"iteration": 100, "consumed-tokens": 100000, "val/lm loss": 7.5})
    write_lines(folder / "metrics.jsonl", *entries, tail=tail)
    event = {"time": "2026-11-24T10:00:00+00:00", "iteration": 3, "kind": "spike", "text": f"leapt {word}"}
    write_lines(
        folder / "events.jsonl", event, {**event, "kind": word}, {"kind": "saved", "text": "a folder"}
    )
    write_lines(folder / "samples.jsonl", {"iteration": 5, "prompt": word, "continuation": f"went on {word}"})
    attempt = {"job_id": 7, "attempt": 1, "nodes": word, "status": 75, "cause": word, "action": "requeued"}
    write_lines(folder / "slurm" / "job_7" / "attempts.jsonl", attempt)
    (folder / "wandb_run_id").write_text(f"{word}\n")
    (folder / "checkpoints" / "iter_0000150").mkdir(parents=True)
    return folder


def report(folder: Path) -> Page:
    assert cli.main(["report", str(folder)]) == 0
    return Page((folder / "report.html").read_text())


def test_the_page_has_all_of_a_run(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    page = report(folder)
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert list(page.images) == [
        "Loss", "Learning rate", "Gradient norm", "Throughput", "Model FLOP/s", "Time of an iteration",
        "Peak memory",
    ]  # fmt: skip
    for image in page.images.values():
        assert ElementTree.fromstring(image).tag.endswith("svg")
    for shown in (
        "iteration 199 of 300", "last event: plain", "W&B run plain", "7.5000", "trainer.seq_length", "tsp",
        "leapt plain", "went on plain", "requeued", "150",
    ):  # fmt: skip
        assert shown in page.shown
    assert "a place" not in page.shown


def test_nothing_of_a_run_becomes_code_and_nothing_is_fetched(tmp_path):
    folder = make_run(tmp_path / "run", EVIL)
    page = report(folder)
    text = (folder / "report.html").read_text()
    assert page.tags == TAGS
    assert page.attributes == {"lang", "charset", "name", "content", "http-equiv", "class", "alt", "src"}
    assert page.shown.count("<script>alert('x')</script>") >= 8  # as text
    assert "<script" not in text and "default-src 'none'" in text
    assert "url(" not in text  # of a style; `Page` has looked at where images come from


def test_a_run_that_still_writes_and_one_without_extras(tmp_path):
    folder = make_run(tmp_path / "run", tail='{"iteration": 200, "lm')
    for name in ("events.jsonl", "samples.jsonl", "wandb_run_id", "slurm/job_7/attempts.jsonl"):
        (folder / name).unlink()
    (folder / "checkpoints" / "iter_0000150").rmdir()
    page = report(folder)
    assert "iteration 199 of 300" in page.shown and "none yet" in page.shown
    assert "Events" not in page.shown and "Samples" not in page.shown and "Attempts" not in page.shown
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[50:60] = [
        "damaged",
        "[]",
        '{"iteration": "x"}',
        '{"iteration": 51, "lm loss": NaN, "grad-norm": "x"}',
        '{"iteration": 52, "consumed-tokens": "x", "grad-norm": 1e300, "tokens/s/gpu": 1' + 400 * "0" + "}",
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert "iteration 199 of 300" in report(folder).shown


def test_a_real_run_at_another_place(tmp_path, capsys):
    write_corpus(tmp_path / "corpus")
    train_on_ranks(1, overrides(tmp_path / "corpus", tmp_path, "trainer.eval_interval=5"))
    output = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "run"), "--output", str(output)]) == 0
    page = Page(output.read_text())
    assert "last event: finished" in page.shown and "1 ranks on 1 node" in page.shown
    assert not (tmp_path / "run" / "report.html").exists()


def refused(capsys, *arguments: object) -> str:
    assert cli.main(["report", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_shown_is_refused(tmp_path, capsys):
    assert "no run folder" in refused(capsys, tmp_path / "absent")
    assert "is no run of megatsp: it has no config.yaml" in refused(capsys, tmp_path)
    folder = make_run(tmp_path / "run")
    assert "give a file in a folder that exists" in refused(capsys, folder, "--output", tmp_path)
    assert "give a file in a folder" in refused(capsys, folder, "--output", tmp_path / "no" / "page.html")
    (folder / "metrics.jsonl").write_text("")
    (folder / "events.jsonl").unlink()
    (folder / "slurm" / "job_7" / "attempts.jsonl").unlink()
    assert "metrics.jsonl has no entry yet" in refused(capsys, folder)
    (folder / "metrics.jsonl").unlink()
    assert "metrics.jsonl has no entry yet" in refused(capsys, folder)


def test_a_job_that_ended_before_its_first_metric_is_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    write_lines(
        folder / "slurm" / "job_7" / "attempts.jsonl", {"action": "requeue", "cause": "lost n3 \ud800"}
    )
    for name in ("metrics.jsonl", "config.yaml", "events.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    shown = report(folder).shown
    assert "nothing was logged yet" in shown and "Curves" not in shown
    assert "lost n3 ?" in shown and "requeue" in shown


def test_long_runs_are_thinned_and_keep_their_spikes():
    points = [(i, 99.0 if i == 7777 else -5.0 if i == 3333 else i % 3) for i in range(20000)]
    kept = thinned(points, 500)
    assert len(kept) <= 500 and kept == sorted(kept)
    assert (7777, 99.0) in kept and (3333, -5.0) in kept
    assert thinned(points[:500], 500) == points[:500]
    metrics = [{"iteration": i, "lm loss": value} for i, value in points]
    ((title, uri),) = drawings(metrics, [])
    assert title == "Loss" and len(uri) < 250_000


def test_it_needs_neither_torch_nor_wandb(tmp_path):
    folder = make_run(tmp_path / "run")
    code = (
        f"import sys, megatsp.cli as c; c.main(['report', {str(folder)!r}])\n"
        "sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=LIMIT_S)
    assert (result.returncode, result.stderr) == (0, b"")
