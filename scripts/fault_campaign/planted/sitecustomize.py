"""In a rank of the campaign: strikes at the event that MEGATSP_FAULT names, once in a run.

Python imports it at its start, from PYTHONPATH: at that of a rank, or of the process that ranks are forked
from. It slows steps, evaluations and flushes of a tiny run a
little, so that random moments fall into each of them. Nothing of torch or megatsp is imported here.

MEGATSP_FAULT is JSON: folder (for its marks), rank, event (start, step, save, evaluate, forward,
batch), count (of which event of its kind in this process), delay_s (after it), action (see `_ACTIONS`).
"""

import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

STEP_S, EVALUATE_S, FLUSH_S = 0.05, 0.1, 0.004


def _launcher(number):
    return lambda: os.kill(int(os.environ["MEGATSP_LAUNCHER_PID"]), number)


def _terminate_all():
    """As a scheduler may do: to every process of the trial, the launcher's and the readers' too."""
    mark = os.environ["MEGATSP_FAULTS_TRIAL"]
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MEGATSP_FAULTS_TRIAL={mark}".encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGTERM)
        except OSError:
            continue


_ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill job": _launcher(signal.SIGKILL),
    "terminate": _launcher(signal.SIGTERM),
    "terminate all": _terminate_all,
    "warn": _launcher(signal.SIGUSR1),
}


class Fault:
    """The fault of this run, on the rank that it strikes."""

    def __init__(self, given):
        self.folder, self.given = Path(given["folder"]), given
        self.seen = {}

    @property
    def is_here(self):
        return os.environ.get("RANK") == str(self.given["rank"])

    def event(self, name):
        """Something of this name begins; whether it is the one to strike at."""
        self.seen[name] = self.seen.get(name, 0) + 1
        if not self.is_here or (name, self.seen[name]) != (self.given["event"], self.given["count"]):
            return False
        if self.given["action"] in _ACTIONS:
            threading.Timer(self.given["delay_s"], self.strike).start()
        return True

    def strike(self):
        if self.mark():
            _ACTIONS[self.given["action"]]()

    def mark(self):
        """Notes the time of the fault; False if it has struck before."""
        try:
            with (self.folder / "struck").open("x") as file:
                file.write(repr(time.time()))
        except FileExistsError:
            return False
        return True


class Wrap(importlib.abc.MetaPathFinder):
    """Changes modules right after they were run."""

    def __init__(self, changes):
        self.changes = changes

    def find_spec(self, name, path=None, target=None):
        if name not in self.changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run, change = spec.loader.exec_module, self.changes[name]

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


def plant(fault):
    """Makes the events, and spoils numbers if the fault is one of those."""
    action = fault.given["action"]

    def optimizer(module):
        step = module.AdamW.step

        def slow_step(self, *arguments, **options):
            fault.event("step")
            time.sleep(STEP_S)
            return step(self, *arguments, **options)

        module.AdamW.step = slow_step

    def evaluate(module):
        plain = module.evaluate

        def slow_evaluate(*arguments, **options):
            fault.event("evaluate")
            time.sleep(EVALUATE_S)
            return plain(*arguments, **options)

        module.evaluate = slow_evaluate

    def gpt(module):
        """A machine's fault: the losses of one forward are not finite, once."""
        forward = module.GPT.forward

        def spoilt_forward(self, *arguments, **options):
            result = forward(self, *arguments, **options)
            if result.requires_grad and fault.event("forward") and fault.mark():
                return result * float("nan")
            return result

        module.GPT.forward = spoilt_forward

    def ranks(module):
        """A fault of the data: the samples of one micro-batch, whenever they come."""
        plain, spoilt = module.on_device, fault.folder / "spoilt"

        def spoilt_batch(batch, device):
            ids, labels, mask, first = plain(batch, device)
            digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
            if fault.event("batch") and fault.mark():
                spoilt.write_text(digest)
            if fault.is_here and spoilt.exists() and spoilt.read_text() == digest:
                mask = mask * float("nan")
            return ids, labels, mask, first

        module.on_device = spoilt_batch

    def rank(module):
        run_rank = module.run_rank

        def started(work):
            fault.event("start")
            run_rank(work)

        module.run_rank = started

    changes = {
        "megatsp.launcher.rank": rank,
        "megatsp.training.optimizer": optimizer,
        "megatsp.training.evaluate": evaluate,
    }
    if action == "spoil once":
        changes["megatsp.model.gpt"] = gpt
    if action == "spoil data":
        changes["megatsp.training.ranks"] = ranks
    sys.meta_path.insert(0, Wrap(changes))

    flush = os.fsync

    def slow_flush(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) else ""
        if "/checkpoints/" in path:
            fault.event("save")
            time.sleep(FLUSH_S)
        return flush(descriptor)

    os.fsync = slow_flush


if os.environ.keys() & {"RANK", "MEGATSP_SERVER"} and "MEGATSP_FAULT" in os.environ:
    plant(Fault(json.loads(os.environ["MEGATSP_FAULT"])))
