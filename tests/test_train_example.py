"""``examples/train.py``, run as a user runs it."""

from __future__ import annotations

from pathlib import Path

from qsm_lightning import runs
from tests.helpers import ROOT, run_python

SETTINGS = {
    **{"data.init_random_frames": "1000", "data.eval_every_frames": "1500", "data.total_frames": "1060"},
    **{"model.loss.hidden": "[128,128]", "model.loss.m_q": "auto", "model.loss.score_at": "denoised"},
}


def test_it_trains_as_the_command_does(tmp_path: Path) -> None:
    """The same losses and the same evaluation, and a checkpoint that the other commands take."""
    run_python(ROOT / "examples" / "train.py", SETTINGS["data.total_frames"], cwd=tmp_path)
    run_python("-m", "qsm_lightning", *(f"--{name}={value}" for name, value in SETTINGS.items()), cwd=tmp_path)
    folders = [tmp_path / "runs" / "Pendulum-v1" / f"version_{i}" for i in range(2)]
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in runs.metrics(folder / runs.METRICS)[1]]
        for folder in folders
    ]
    assert rows[0] == rows[1]
    assert any(row["eval/return"] for row in rows[0])
    assert any(row["loss/actor"] for row in rows[0])
    evaluate = "from qsm_lightning.commands.evaluate import main; main()"
    assert "frames: 1060" in run_python("-c", evaluate, folders[0], "--episodes=1")
