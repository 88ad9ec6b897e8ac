"""Environments that raise, hang, die, return NaN or change shape: the run stops with a checkpoint, or goes on anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qsm_lightning import checkpoints
from qsm_lightning.collect import GymCollector
from tests.compare import assert_same, curves, differences, last, rows, state
from tests.faulty_envs import AGE, EPISODE, LENGTH, LIFE, LIVES, NAME, plan
from tests.helpers import SHRINK
from tests.processes import fit
from tests.test_datamodule import train

TINY = [
    *("--config=pendulum", *SHRINK, "--data.total_frames=90", "--data.eval_every_frames=30", f"--data.env={NAME}"),
    *("--data.eval_selector=sample", "--data.eval_episodes=1", "--metrics.every_frames=10"),
    "--picture.every_evaluations=0",
]
BOTH = ["--data.eval_selector=both"]
# Evaluation comes last, so that a run that stops before needs no processes for it.
PROCESSES = ["--data.env_processes=true", "--data.env_timeout=3", "--data.eval_every_frames=90"]
RAISED = "(ValueError: the robot fell over)"
# name: settings, the fault, what is said of it, and the frames before it
CASES: dict[str, tuple[list[str], dict[str, Any], str, int]] = {
    "an error": ([], {"fault": "raise", "age": 47}, RAISED, 46),
    "an error in a reset": ([], {"fault": "raise", "age": 49, "at": "reset"}, RAISED, 48),
    "an error in the first step": ([], {"fault": "raise", "age": 1}, RAISED, 0),
    "an error right after an evaluation": ([], {"fault": "raise", "age": 31}, RAISED, 30),
    "NaN in the warm-up": ([], {"fault": "NaN", "age": 17}, "observation is NaN or infinite", 16),
    "NaN in a reset": ([], {"fault": "NaN", "age": 49, "at": "reset"}, "observation is NaN or infinite", 48),
    "an infinite reward": ([], {"fault": "inf", "age": 47}, "reward is NaN or infinite", 46),
    "a reward beyond float32": ([], {"fault": "huge", "age": 47}, "reward is NaN or infinite", 46),
    "another shape": ([], {"fault": "shape", "age": 47}, "[5]", 46),
    "one of several copies": (
        ["--data.num_envs=3", "--data.frames_per_batch=6"],
        {"fault": "raise", "age": 20},
        RAISED,
        54,
    ),
}
PROCESS_CASES: dict[str, tuple[list[str], dict[str, Any], str, int]] = {
    "an error": ([], {"fault": "raise", "age": 47}, RAISED, 46),
    "a hang": ([], {"fault": "hang", "age": 47}, "did not answer within data.env_timeout (3 s)", 46),
    "the end of one of two": (["--data.num_envs=2"], {"fault": "kill", "age": 24}, "died", 46),
}


def run_of(folder: Path) -> Path:
    return next(folder.glob("runs/*/version_0"))


def resume_arguments(text: str) -> list[str]:
    """What the last lines printed say to type."""
    return text.split("resume with: qsm-fit ")[1].split()


def frames_of_lives(run: Path) -> list[int]:
    """How many frames of the replay buffer each environment gave, which must all be as that environment made them."""
    replay = state(run)["OffPolicyDataModule"]["ranks"][0]["replay"]
    assert all(value.isfinite().all() for value in replay.values())
    torch.testing.assert_close(replay["next.reward"], replay["action"], rtol=0, atol=0)
    counts = []
    for life in replay["observation"][:, LIFE].unique():
        mine = replay["observation"][:, LIFE] == life
        before, after = replay["observation"][mine], replay["next.observation"][mine]
        step = torch.arange(len(before))
        assert torch.equal(before[:, AGE], step.float()), "a frame is missing, or comes twice"
        assert torch.equal(after[:, AGE], step + 1.0), "a frame leads elsewhere"
        assert torch.equal(after[:, [EPISODE, LIFE]], before[:, [EPISODE, LIFE]]), "a frame joins two episodes"
        done = replay["next.done"][mine].view(-1)
        assert torch.equal(done, step % LENGTH == LENGTH - 1), "an episode ends elsewhere"
        within = ~done[:-1]
        assert torch.equal(before[1:][within], after[:-1][within]), "a frame does not follow the one before"
        counts.append(len(before))
    assert sum(counts) == len(replay["action"])
    return counts


def logged(run: Path, name: str) -> list[float]:
    """The frames at which metrics.csv has a value."""
    return [float(row["step"]) for row in rows(run) if name in row]


def assert_stopped(folder: Path, text: str, said: str, frames: int) -> None:
    """A sentence that names the environment and the fault, a whole checkpoint after ``frames``, and all metrics."""
    run = run_of(folder)
    checkpoint = last(run)
    assert checkpoint.order[0] == frames
    sentence, command = text.strip().splitlines()[-2:]
    assert sentence.startswith("qsm-fit: ")
    for part in (f"environment {NAME} ", said, f", after frame {frames};", str(checkpoint.path.relative_to(folder))):
        assert part in sentence
    assert command.startswith("resume with: qsm-fit --resume ")
    assert "Traceback" not in text
    content = checkpoints.load(checkpoint.state)
    assert content["OffPolicyDataModule"]["progress"]["frames"] == frames
    assert all(value.isfinite().all() for value in content["state_dict"].values())
    if frames:
        assert sum(frames_of_lives(run)) == frames
        assert logged(run, "train/episodes")[-1] > frames - 16
    assert_no_process_is_left(folder)


def assert_ended(folder: Path, lives: list[int]) -> None:
    """A run that reached its end has every frame and every metric once; ``lives`` are the frames of each environment.

    Args:
        folder: where the run works.
        lives: frames of each environment, oldest first.
    """
    run = run_of(folder)
    assert last(run).order[0] == sum(lives)
    assert frames_of_lives(run) == lives
    for steps in (logged(run, "train/episodes"), logged(run, "eval/return")):
        assert steps == sorted(set(steps))
        assert steps[-1] == sum(lives)
    assert_no_process_is_left(folder)


def assert_no_process_is_left(folder: Path) -> None:
    for pid in set((folder / LIVES).read_text().split()):
        command = Path(f"/proc/{pid}/cmdline")
        assert not command.exists() or not command.read_bytes(), f"{pid} still runs"  # without one it is a zombie


@pytest.mark.parametrize("case", CASES)
def test_a_fault_stops_the_run_with_a_checkpoint_and_it_goes_on_when_mended(case: str, tmp_path: Path) -> None:
    settings, fault, said, frames = CASES[case]
    plan(tmp_path, **fault)
    text = fit(tmp_path, *TINY, *settings, status=3)
    assert_stopped(tmp_path, text, said, frames)
    text = fit(tmp_path, *resume_arguments(text))
    assert f"from frame {frames}" in text
    assert text.count("begins new episodes") == 1
    copies = 3 if "num_envs" in str(settings) else 1
    lives = [frames // copies] * copies + [(90 - frames) // copies] * copies
    assert_ended(tmp_path, [count for count in lives if count])
    if copies == 1:
        assert logged(run_of(tmp_path), "train/episodes") == [*range(10, 91, 10)]
        assert logged(run_of(tmp_path), "eval/return") == [30, 60, 90]


def test_a_fault_before_the_first_frame_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """There is no state yet to go on with."""
    plan(tmp_path, "raise", 0, at="reset")
    text = fit(tmp_path, *TINY, status=3)
    sentence = text.strip().splitlines()[-1]
    assert f"the environment {NAME} failed {RAISED}" in sentence
    assert "nothing was saved" in sentence
    assert "Traceback" not in text
    assert not checkpoints.complete(run_of(tmp_path) / "checkpoints")


def test_a_resumed_run_that_meets_a_fault_at_once_names_where_it_came_from(tmp_path: Path) -> None:
    plan(tmp_path, "raise", 47)
    text = fit(tmp_path, *TINY, status=3)
    plan(tmp_path, "raise", 0, at="reset")
    text = fit(tmp_path, *resume_arguments(text), status=3)
    sentence = text.strip().splitlines()[-2]
    assert f"the environment {NAME} failed {RAISED}" in sentence
    assert str(last(run_of(tmp_path)).path.relative_to(tmp_path)) in sentence
    assert last(run_of(tmp_path)).order[0] == 46
    assert "Traceback" not in text
    fit(tmp_path, *resume_arguments(text))
    assert_ended(tmp_path, [46, 44])


@pytest.mark.parametrize("case", PROCESS_CASES)
def test_a_fault_in_a_process_stops_the_run_too(case: str, tmp_path: Path) -> None:
    settings, fault, said, frames = PROCESS_CASES[case]
    plan(tmp_path, **fault)
    text = fit(tmp_path, *TINY, *PROCESSES, *settings, status=3)
    assert_stopped(tmp_path, text, said, frames)
    text = fit(tmp_path, *resume_arguments(text), "--data.env_processes=false")
    assert text.count("begins new episodes") == 1
    copies = 2 if settings else 1
    assert_ended(tmp_path, [frames // copies] * copies + [(90 - frames) // copies] * copies)


@pytest.mark.parametrize(
    ("settings", "fault", "lives"),
    [
        pytest.param([], {"fault": "raise", "age": 30}, [29, 29, 32], id="step"),
        pytest.param([], {"fault": "shape", "age": 28, "at": "reset"}, [27, 27, 36], id="reset"),
        pytest.param([], {"fault": "raise", "age": 0, "at": "reset"}, [90], id="first reset"),
        pytest.param(["--data.frames_per_batch=5"], {"fault": "NaN", "age": 34}, [30, 30, 30], id="within a chunk"),
    ],
)
def test_failed_environments_are_built_anew(
    settings: list[str], fault: dict[str, Any], lives: list[int], tmp_path: Path
) -> None:
    """Every frame is trained on once and no frame joins two lives; what was collected of a broken chunk is dropped."""
    plan(tmp_path, **fault, times=2)
    text = fit(tmp_path, *TINY, *settings, "--data.env_restarts=2")
    said = [line for line in text.splitlines() if f"environment {NAME} " in line]
    assert ["built anew (1 of 2)" in said[0], "built anew (2 of 2)" in said[1], len(said)] == [True, True, 2]
    assert_ended(tmp_path, lives)
    content = state(run_of(tmp_path))["OffPolicyDataModule"]
    progress = content["progress"]
    assert [progress["frames"], progress["updates"], progress["env_restarts"]] == [90, 50, 2]
    assert progress["episodes"] == sum(count // LENGTH for count in lives)


def test_environments_built_anew_get_no_second_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan(tmp_path, "raise", 50)
    _, data = train(tmp_path, NAME, env_restarts=1)
    assert data.progress.env_restarts == 1
    assert isinstance(data.collector, GymCollector)
    assert data.collector._frames == data.progress.frames


def test_a_run_stops_when_no_restart_is_left(tmp_path: Path) -> None:
    plan(tmp_path, "raise", 20, times=3)
    text = fit(tmp_path, *TINY, "--data.env_restarts=2", status=3)
    assert text.count("built anew") == 2
    assert_stopped(tmp_path, text, RAISED, 57)
    assert frames_of_lives(run_of(tmp_path)) == [19, 19, 19]
    fit(tmp_path, *resume_arguments(text))
    assert_ended(tmp_path, [19, 19, 19, 33])


def test_processes_are_started_anew_whatever_ended_them(tmp_path: Path) -> None:
    """One dies in training; then evaluation, which begins by seeding them, meets a hang and an error."""
    plan(tmp_path, "kill", 47)
    plan(tmp_path, "hang", 0, at="reset", where="evaluation")
    plan(tmp_path, "raise", 0, at="reset", where="evaluation")
    text = fit(tmp_path, *TINY, *PROCESSES, "--data.env_restarts=3")
    died, hung, failed = (line for line in text.splitlines() if f"environment {NAME} " in line)
    assert "died" in died
    assert "after frame 46: built anew (1 of 3)" in died
    assert "did not answer within data.env_timeout (3 s), after frame 90: built anew (2 of 3)" in hung
    assert f"{RAISED}, after frame 90: built anew (3 of 3)" in failed
    assert "Traceback" not in text
    assert_ended(tmp_path, [46, 44])


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults."""
    folder = tmp_path_factory.mktemp("healthy")
    fit(folder, *TINY, *BOTH)
    assert_ended(folder, [90])
    return run_of(folder)


# The steps of an evaluation environment's life: 1 to 7 sample, 8 to 14 best_of_n, and so on in the next evaluation.
@pytest.mark.parametrize(
    ("fault", "frames"),
    [
        pytest.param({"fault": "raise", "age": 3}, 30, id="first evaluation"),
        pytest.param({"fault": "NaN", "age": 26}, 60, id="second policy"),
        pytest.param({"fault": "raise", "age": 0, "at": "reset"}, 30, id="first reset"),
    ],
)
def test_a_fault_in_evaluation_leaves_training_exact(
    fault: dict[str, Any], frames: int, healthy: Path, tmp_path: Path
) -> None:
    """Stopped and resumed, or with the evaluation done again, the run is the same as without the fault, bit by bit."""
    stopped, repeated = tmp_path / "stopped", tmp_path / "repeated"
    for folder in (stopped, repeated):
        folder.mkdir()
        plan(folder, **fault, where="evaluation")
    text = fit(stopped, *TINY, *BOTH, status=3)
    said = RAISED if fault["fault"] == "raise" else "observation is NaN or infinite"
    assert_stopped(stopped, text, said, frames)
    text = fit(stopped, *resume_arguments(text))
    assert "begins new episodes" not in text
    assert_same(healthy, run_of(stopped))

    text = fit(repeated, *TINY, *BOTH, "--data.env_restarts=1")
    assert text.count("built anew (1 of 1)") == 1
    run = run_of(repeated)
    different = differences(state(healthy), state(run))
    assert different
    assert all("env_restarts: 0 and 1" in d for d in different), different
    assert rows(run) == rows(healthy)
    assert curves(run) == curves(healthy)


def test_a_fault_in_an_evaluation_video_stops_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    plan(tmp_path, "raise", 3, where="video")
    text = fit(tmp_path, *TINY, "--trainer.callbacks+=qsm_lightning.callbacks.EvaluationVideo", status=3)
    assert_stopped(tmp_path, text, RAISED, 30)
    fit(tmp_path, *resume_arguments(text))
    assert_ended(tmp_path, [90])
