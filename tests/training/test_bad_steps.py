"""Steps with bad numbers: skipped, computed again, rolled back from; and losses that leap."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from runs import full_state, losses, overrides, start_training, write_corpus

from megatsp.checkpoint.paths import LATEST, folder_of
from megatsp.checkpoint.state import RunState
from megatsp.checkpoint.store import read_state, save
from megatsp.compose import compose, to_yaml
from megatsp.data.loader import read_batch
from megatsp.schema import Config, TrainerConfig
from megatsp.training.bad_steps import Back, Verdict, after_step, judge_step, rolled_back, way_back
from megatsp.training.events import of_step, read_objects
from megatsp.training.logs import read_metrics
from megatsp.training.run import Training
from megatsp.training.spikes import is_spike

STEPS = ["trainer.train_iters=8", "trainer.eval_iters=1", "checkpoint.save_interval=2", "parallel.tsp=2"]
ROLLS_BACK = ["trainer.on_bad_steps=rollback", "trainer.max_bad_steps=3"]
BAD = (16, 28)  # the samples of steps 5 to 7


class Poisoned:
    """A loader in which some samples have no loss but NaN."""

    def __init__(self, loader: Any, rows: torch.Tensor) -> None:
        self._loader, self._rows = loader, rows

    def __next__(self) -> Any:
        ids, labels, mask, first = next(self._loader)
        mask = mask.clone()
        mask[(ids[:, None] == self._rows).all(2).any(1)] = float("nan")
        return ids, labels, mask, first

    def close(self) -> None:
        self._loader.close()


def poison(training: Training, start: int, stop: int) -> None:
    """Makes the samples at these places of the order bad."""
    draws = training.data.train.draw(start, stop - start)
    rows = read_batch(training.data.train, draws, training.share.spans)[0]
    loader = training.loader
    training.loader = lambda: Poisoned(loader(), rows)


def fail_at(training: Training, *calls: int) -> None:
    """Makes these forwards of rank 1 give NaN, counted from 1: as a machine that fails now and then."""
    count = 0

    def forward(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return output * float("nan") if count in calls else output

    if dist.get_rank() == 1:
        training.gpt.register_forward_hook(forward)


def nothing(training: Training) -> None:
    pass


def bad_at_4(training: Training) -> None:
    poison(training, 12, 16)


def bad_at_5_to_7(training: Training) -> None:
    poison(training, *BAD)


def bad_at_5_to_7_of_an_import(training: Training) -> None:
    """As after `megatsp convert import`: a checkpoint of iteration 0, without moments."""
    bad_at_5_to_7(training)
    extra = {"config.yaml": to_yaml(training.config).encode()}
    save(training.folder / "checkpoints", RunState(), training.gpt, {}, extra, training.tokenizer)
    if dist.get_rank() == 0:
        (training.folder / "config.yaml").write_text(to_yaml(training.config))
    training.candidates = [folder_of(training.folder / "checkpoints", 0)]


def bad_after_3_rollbacks(training: Training) -> None:
    poison(training, *BAD)
    training.state = replace(training.state, rollbacks=3)


def always_bad_from_5(training: Training) -> None:
    poison(training, 16, 56)


def never_sees_them(training: Training) -> None:
    training.state = replace(training.state, skipped_samples=(BAD,))


def fails_once(training: Training) -> None:
    fail_at(training, 5)  # the first of two micro-batches of step 3


def fails_twice(training: Training) -> None:
    fail_at(training, 5, 8)  # and the other one, when the step is computed again


RUNS: dict[str, tuple[Callable[[Training], None], list[str]]] = {
    "clean": (nothing, []),
    "skips": (bad_at_4, []),
    "without": (never_sees_them, []),
    "rolls-back": (bad_at_5_to_7, ROLLS_BACK),
    "rolls-back-to-the-start": (bad_at_5_to_7, [*ROLLS_BACK, "checkpoint.save_interval=0"]),
    "rolls-back-further": (always_bad_from_5, [*ROLLS_BACK, "trainer.max_rollbacks=2"]),
    "rolls-back-to-an-import": (bad_at_5_to_7_of_an_import, [*ROLLS_BACK, "checkpoint.save_interval=0"]),
    "stops": (bad_at_5_to_7, []),
    "no-more-rollbacks": (bad_after_3_rollbacks, ROLLS_BACK),
    "fails-once": (fails_once, []),
    "fails-twice": (fails_twice, []),
}


def run_all(runs: list[tuple[Config, Callable[[Training], None]]]) -> list[dict[str, Any]]:
    """On a rank: what became of each run."""
    found = []
    for config, plant in runs:
        training = start_training(config)
        said: list[str] = []
        step = training.step

        def noted(*given: Any, step: Any = step, said: list[str] = said) -> Any:
            result = step(*given)
            said.extend(result.lines)
            return result

        training.step = noted  # type: ignore[method-assign]
        plant(training)
        status, error = None, ""
        try:
            status = training.run()
        except ValueError as stopped:
            error = str(stopped)
        (counter, *_) = {float(s["step"]) for s in training.optimizer._optimizer.state.values()}
        found.append(
            {"status": status, "error": error, "said": said, "state": training.state, "adam": counter}
        )
        found[-1]["tensors"] = full_state(training)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    jobs = [
        (compose(overrides(folder / "corpus", folder, f"name={name}", *STEPS, *more)), plant)
        for name, (plant, more) in RUNS.items()
    ]
    return dict(zip(RUNS, run_distributed(run_all, 2, jobs)[0], strict=True))


def steps(folder: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in read_metrics(folder / name / "metrics.jsonl") if "lm loss" in e]


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(tensor, other["tensors"][name]) for name, tensor in one["tensors"].items())


def test_a_bad_step_is_skipped_counted_and_its_documents_are_named(runs, folder):
    found = runs["skips"]
    assert found["status"] == 0 and found["state"].iteration == 8 and found["state"].consumed_samples == 32
    assert found["state"].skipped_steps == 1 and found["adam"] == 7
    assert found["state"].bad_steps_in_a_row == 0
    entries = steps(folder, "skips")
    assert [e["skipped-steps"] for e in entries] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert entries[3]["lm loss"] is None and losses(entries)[:3] == losses(steps(folder, "clean"))[:3]
    assert losses(entries)[4] != losses(steps(folder, "clean"))[4]
    again, blamed = found["said"]
    assert "gave the same bits again, not finite again" in again
    assert blamed.startswith(" iteration 4: loss nan, gradient norm nan; nothing was updated (1 in a row).\n")
    assert "\nDocuments of the samples whose loss is not finite: doc" in blamed


@pytest.mark.parametrize("name", ["rolls-back", "rolls-back-to-the-start", "rolls-back-to-an-import"])
def test_a_rolled_back_run_equals_one_that_never_saw_the_samples(runs, folder, name):
    back, without = runs[name], runs["without"]
    assert back["status"] == 0 and back["state"].rollbacks == 1
    assert back["state"].skipped_samples == (BAD,) and back["state"].skipped_steps == 0
    assert back["state"].consumed_samples == without["state"].consumed_samples == 32 + 12
    assert is_same(back, without) and not is_same(back, runs["clean"])
    assert losses(steps(folder, name)) == losses(steps(folder, "without"))
    assert (folder / name / "checkpoints" / LATEST).read_text() == "8\n"


def test_a_run_that_gets_no_further_is_rolled_back_further(runs, folder):
    assert "after 2 rollbacks (trainer.max_rollbacks)" in runs["rolls-back-further"]["error"]
    state = runs["rolls-back-further"]["state"]
    assert (state.rolled_back_from, state.rolled_back_to) == (5, 2)  # first to 4
    assert state.skipped_samples == ((16, 40),)
    assert (folder / "rolls-back-further" / "checkpoints" / "iter_0000004.abandoned").is_dir()


@pytest.mark.parametrize(("name", "iteration"), [("rolls-back", 4), ("rolls-back-further", 2)])
def test_the_checkpoint_that_a_run_goes_back_to_knows_what_to_leave_out(runs, folder, name, iteration):
    saved = read_state(folder_of(folder / name / "checkpoints", iteration))
    left = runs[name]["state"]
    assert (saved.rollbacks, saved.skipped_samples) == (left.rollbacks, left.skipped_samples)


def test_too_many_bad_steps_stop_the_run_with_its_checkpoint(runs, folder):
    error = runs["stops"]["error"]
    assert error.startswith("iteration 7: loss nan, gradient norm nan; nothing was updated.\nDocuments of")
    assert error.endswith("the last checkpoint is of iteration 4")  # none was saved at 6
    assert (folder / "stops" / "checkpoints" / LATEST).read_text() == "4\n"
    assert "after 3 rollbacks (trainer.max_rollbacks)" in runs["no-more-rollbacks"]["error"]


def test_a_machine_that_fails_once_is_named_and_changes_nothing(runs, folder):
    (line,) = runs["fails-once"]["said"]
    assert "gave other bits, finite now: hardware is suspected: rank 1 on " in line
    assert is_same(runs["fails-once"], runs["clean"])
    assert losses(steps(folder, "fails-once")) == losses(steps(folder, "clean"))
    assert runs["fails-once"]["state"].skipped_steps == 0


def test_a_machine_that_fails_twice_ends_the_run(runs, folder):
    found = runs["fails-twice"]
    assert found["status"] == 77 and found["state"].iteration == 2
    assert "gave other bits, not finite again: hardware is suspected: rank 1 on " in found["said"][0]
    assert (folder / "fails-twice" / "checkpoints" / LATEST).read_text() == "2\n"


EVENTS = {
    "clean": ["started", "finished"],
    "skips": ["started", "not finite", "finished"],
    "rolls-back": ["started", "not finite", "rollback", "finished"],
    "stops": ["started", "not finite", "failed"],
    "fails-once": ["started", "other bits", "finished"],
    "fails-twice": ["started", "hardware"],
}


@pytest.mark.parametrize("name", EVENTS)
def test_a_streak_of_bad_steps_is_one_event(runs, folder, name):
    events = read_objects(folder / name / "events.jsonl")
    assert [event["kind"] for event in events if event["kind"] != "saved"] == EVENTS[name]


def test_spikes_are_events_whatever_is_done():
    before, after = RunState(iteration=3), RunState(iteration=4, loss_spikes=1)
    assert [event.kind for event in of_step(before, after, [" a leap"])] == ["spike"]
    assert [event.kind for event in of_step(before, before, [" a leap"])] == []  # of a rollback's own event


def test_spikes_are_far_above_the_median():
    recent = [2.0 + 0.1 * (i % 3) for i in range(16)]  # median 2.1, MAD 0.1
    assert is_spike(2.1 + 1.4826 * 1.01, recent, 10) and not is_spike(2.1 + 1.4826 * 0.99, recent, 10)
    assert not is_spike(100.0, recent[:15], 10)  # too few to know
    assert not is_spike(100.0, recent, 0) and not is_spike(100.0, [2.0] * 20, 10)


def test_what_becomes_of_a_spike_is_configured():
    recent = tuple(2.0 + 0.1 * (i % 3) for i in range(16))
    state = RunState(iteration=20, consumed_samples=80, recent_losses=recent)
    wanted = {"warn": Verdict.UPDATE, "skip": Verdict.SKIP, "rollback": Verdict.ROLL_BACK}
    for choice, verdict in wanted.items():
        settings = TrainerConfig(on_spike=choice, spike_window=16)
        judgement = judge_step(9.0, True, False, state, settings)
        assert (judgement.verdict, judgement.is_spike) == (verdict, True)
        after = after_step(state, judgement, True, 9.0, 84, settings)
        assert after.loss_spikes == 1 and after.recent_losses == (*state.recent_losses[1:], 9.0)
        assert after.skipped_steps == (choice == "skip")
        assert judge_step(2.3, True, False, state, settings).verdict is Verdict.UPDATE
    exhausted = replace(state, rollbacks=3)
    assert judge_step(9.0, True, False, exhausted, TrainerConfig(on_spike="rollback")).verdict is Verdict.STOP


def test_the_way_back_leaves_out_all_bad_steps_in_a_row():
    settings, state = TrainerConfig(), RunState(iteration=4, consumed_samples=32)
    for cursor in (40, 48):
        judgement = judge_step(float("nan"), False, False, state, settings)
        assert judgement.verdict is Verdict.SKIP
        state = after_step(state, judgement, False, float("nan"), cursor, settings)
    assert (state.bad_steps_in_a_row, state.bad_samples_from, state.skipped_steps) == (2, 32, 2)
    back = way_back(state, 56, is_finite=False)
    assert back == Back(before=5, start=32, stop=56)
    found = rolled_back(RunState(iteration=4), replace(state, skipped_samples=((8, 16), (24, 33))), back)
    assert found.skipped_samples == ((8, 16), (24, 56)) and found.rollbacks == 1
    assert way_back(state, 56, is_finite=True) == Back(7, 48, 56)  # a spike, alone
    assert (found.rolled_back_from, found.rolled_back_to) == (5, 4)
    assert way_back(found, 64, is_finite=False) == Back(5, 0, 64, rather=4)  # it came no further
    assert way_back(replace(found, iteration=5), 64, is_finite=False).rather == 0
