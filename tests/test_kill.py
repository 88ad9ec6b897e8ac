"""SIGKILL at random moments: no run is lost, no state is silently wrong."""

from __future__ import annotations

import csv
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from qsm_lightning import checkpoints
from tests.compare import assert_same
from tests.helpers import SHRINK
from tests.processes import Run, fit

EVERY = 10  # frames between checkpoints: about half of the time goes into writing them
SETTINGS = [
    *("--config=pendulum", *SHRINK, f"--checkpoint.every_frames={EVERY}", "--metrics.every_frames=5", "--data.utd=0.2"),
    *("--data.total_frames=1500", "--data.buffer_size=600", "--data.eval_every_frames=250"),
    *("--data.eval_selector=sample", "--data.eval_episodes=1", "--picture.every_evaluations=0"),
]


def last_logged(run: Path) -> int:
    """The last frame of which anything was written down."""
    try:
        with (run / "metrics.csv").open(newline="") as file:
            return max((int(float(row["step"])) for row in csv.DictReader(file) if row["step"]), default=0)
    except FileNotFoundError:
        return 0


def newest(run: Path) -> int:
    """The frame of the newest checkpoint."""
    found = checkpoints.complete(run / "checkpoints")
    return found[-1].order[0] if found else 0


def saving(run: Path, since: float) -> bool:
    """Whether a checkpoint is being written, by a process that began after ``since``."""
    try:
        return (run / "checkpoints" / ".staging").stat().st_mtime > since
    except FileNotFoundError:
        return False


def reached(run: Path, frames: int) -> bool:
    return newest(run) >= frames


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_25_times_and_still_the_same_run(seed: int, tmp_path: Path) -> None:
    """At start-up, while it resumes, collects, updates, evaluates and saves."""
    moments = random.Random(seed)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    folder = tmp_path / "killed" / "runs" / "Pendulum-v1" / "version_0"
    kills, known, interrupted = 0, 0, 0
    seen: set[int] = set()
    while kills < 25:
        saved = checkpoints.complete(folder / "checkpoints")
        args = ["--resume", folder] if saved else SETTINGS
        began = time.time()
        run = Run(tmp_path / "killed", *args)
        if kills % 5 == 4:
            run.until(partial(saving, folder, began), pause=0.0005)
        elif moments.random() < 0.8:  # after some checkpoints of its own, or wherever it is, start-up included
            until = (saved[-1].order[0] if saved else 0) + EVERY * moments.randint(1, 4)
            run.until(partial(reached, folder, until))
        time.sleep(0 if kills % 5 == 4 else moments.uniform(0, 0.2))
        run.signal(signal.SIGKILL)
        assert run.wait() == 128 + signal.SIGKILL, run.text
        assert "Traceback" not in run.text
        kills += 1
        for checkpoint in checkpoints.complete(folder / "checkpoints"):
            checkpoint.verify()
        if found := checkpoints.complete(folder / "checkpoints"):
            frames = found[-1].order[0]
            assert frames >= known, "a checkpoint was lost"
            assert frames > last_logged(folder) - EVERY - 5, "more than one interval was lost"
            known = frames
            seen.add(frames)
            interrupted += bool(list((folder / "checkpoints").glob(".staging*")))
        elif folder.exists():  # killed before its first checkpoint: it begins again, in another folder
            folder = folder.with_name(f"version_{int(folder.name.split('_')[1]) + 1}")
    assert known < 1500, "it was over before it had been killed often enough"
    assert len(seen) > 10, "the kills came too soon to show anything"
    assert interrupted, "it was never killed while it wrote a checkpoint"
    whole = Run(tmp_path / "whole", *SETTINGS)
    fit(tmp_path / "killed", "--resume", folder)
    assert whole.wait() == 0, whole.text
    assert_same(tmp_path / "whole" / "runs" / "Pendulum-v1" / "version_0", folder)
    assert not list((folder / "checkpoints").glob(".[!l]*")), "leftovers of killed processes"
