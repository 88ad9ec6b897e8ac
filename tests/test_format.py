"""Checkpoints of earlier versions go on being read: a run in the first format, kept in tests/data.

Made by ``qsm-fit --config pendulum --model.loss.hidden=[4] --model.loss.time_dim=4 --data.total_frames=60
--data.init_random_frames=40 --data.batch_size=8 --data.buffer_size=50 --data.eval_every_frames=30
--data.eval_episodes=1 --data.eval_candidates=2 --checkpoint.keep_last=1``. A later format adds a folder beside it; what
can no longer be read must be refused in a sentence that says why.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qsm_lightning import checkpoints
from tests.compare import last, state
from tests.helpers import FIRST
from tests.processes import Run, fit, fit_ranks


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the stored run, in which it may go on."""
    copy = tmp_path / "runs" / "Pendulum-v1" / "version_0"
    shutil.copytree(FIRST, copy)
    return copy


def test_the_first_format_is_read(run: Path) -> None:
    checkpoint = last(run)
    assert checkpoint.manifest()["format"] == 1
    assert checkpoint.manifest()["frames"] == 60
    content = checkpoints.load(checkpoint.state)
    assert content["OffPolicyDataModule"]["progress"]["updates"] == 20
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_a_run_in_the_first_format_is_evaluated(run: Path, tmp_path: Path) -> None:
    evaluated = Run(tmp_path, run, "--episodes=1", "--json", name="qsm-eval")
    assert evaluated.wait() == 0, evaluated.text
    result = json.loads(evaluated.text.splitlines()[-1])
    assert result["frames"] == 60
    assert result["length"] == 200


def test_a_run_in_the_first_format_has_settings_that_came_later_at_their_defaults(run: Path, tmp_path: Path) -> None:
    settings = ["--data.total_frames=70", "--model.ema=0.9", "--trainer.gradient_clip_val=1.0"]
    out = fit(tmp_path, "--resume", run, *settings, status=2)
    assert "model.ema (None there, 0.9 here)" in out
    assert "trainer.gradient_clip_val (None there, 1.0 here)" in out
    assert "trainer.gradient_clip_algorithm (None there, 'norm' here)" in out


def test_a_run_in_the_first_format_goes_on(run: Path, tmp_path: Path) -> None:
    before = state(run)["OffPolicyDataModule"]["ranks"][0]
    out = fit(tmp_path, "--resume", run, "--data.total_frames=70")
    assert "begins new episodes" not in out
    after = state(run)["OffPolicyDataModule"]["ranks"][0]
    assert after["progress"]["frames"] == 70
    assert after["progress"]["updates"] == 30
    for key, value in before["replay"].items():
        assert torch.equal(value[10:], after["replay"][key][:40]), key


def test_a_run_in_the_first_format_goes_on_with_two_processes(run: Path, tmp_path: Path) -> None:
    out = fit_ranks(tmp_path, 2, "--resume", run, "--data.total_frames=64")
    assert "the checkpoint is of 1 processes and goes on with 2" in out
    parts = [rank["replay"] for rank in state(run)["OffPolicyDataModule"]["ranks"]]
    assert sum(len(part["action"]) for part in parts) == 50
