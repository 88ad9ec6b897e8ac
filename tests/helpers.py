"""What several test files share: a replay batch, the shipped configurations and how they are shrunk."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from qsm_lightning.compiled import missing_for_compiling
from qsm_lightning.losses import QSM

ROOT = Path(__file__).parents[1]
FIRST = ROOT / "tests" / "data" / "format_1"  # a run of the first version
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))
SHIPPED = partial(QSM, m_q="auto", score_at="denoised")  # as QSM's tasks in conf/ have it
# Shrinks any shipped configuration to a few seconds.
SHRINK = [
    "--model.loss.hidden=[16,16]",
    "--data.total_frames=60",
    "--data.init_random_frames=40",
    "--data.batch_size=8",
    "--data.buffer_size=1000",
    "--data.eval_every_frames=60",
    "--data.eval_episodes=2",
    "--data.eval_candidates=4",
]


def has(module: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(module) is not None


def working_gl() -> str | None:
    """The first of egl and osmesa with which MuJoCo can make a context, tried in a process of its own."""
    script = "import mujoco; context = mujoco.GLContext(64, 64); context.make_current()"
    for name in filter(None, (os.environ.get("MUJOCO_GL"), "egl", "osmesa")):
        run = subprocess.run([sys.executable, "-c", script], env=os.environ | {"MUJOCO_GL": name}, capture_output=True)
        if run.returncode == 0:
            return name
    return None


GL = working_gl()
if GL is not None:  # read when dm_control is imported
    os.environ["MUJOCO_GL"] = GL
needs_gl = pytest.mark.skipif(GL is None, reason="MuJoCo can render with neither egl nor osmesa here")
needs_dmc = pytest.mark.skipif(not has("dm_control"), reason="the extra dmc is not installed")
needs_compiler = pytest.mark.skipif(bool(missing_for_compiling()), reason=missing_for_compiling() or "it can")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
needs_envpool = pytest.mark.skipif(not has("envpool"), reason="the extra envpool is not installed")


def moved_away(*targets: nn.Module) -> None:
    """Have target networks differ from what they follow."""
    for target in targets:
        for p in target.parameters():
            p.data.mul_(1.3).add_(0.05)


def replay_batch(size: int = 32, observation_dim: int = 3, action_dim: int = 2, seed: int = 0) -> TensorDict:
    """A random replay batch with some terminated and some merely truncated frames."""
    g = torch.Generator().manual_seed(seed)
    terminated = torch.rand(size, 1, generator=g) < 0.3
    return TensorDict(
        {
            "observation": torch.randn(size, observation_dim, generator=g),
            "action": 2 * torch.rand(size, action_dim, generator=g) - 1,
            "next": TensorDict(
                {
                    "observation": torch.randn(size, observation_dim, generator=g),
                    "reward": torch.randn(size, 1, generator=g),
                    "terminated": terminated,
                    "done": terminated | (torch.rand(size, 1, generator=g) < 0.3),
                },
                [size],
            ),
        },
        [size],
    )


def twin_values(params: Any, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """The values [2, B] of TorchRL's stacked critics, layer by layer."""
    weights, x = params.flatten_keys("."), torch.cat([observation, action], -1).expand(2, -1, -1)
    for i in range(3):
        weight, bias = (weights[f"module.mlp.layers.{i}.{name}"] for name in ("weight", "bias"))
        x = torch.baddbmm(bias[:, None], x if i == 0 else x.relu(), weight.transpose(1, 2))
    return x.squeeze(-1)


def environment() -> dict[str, str]:
    """This process's environment with one thread, wide lines, and tests/ importable by name."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}


def run_python(*args: str | Path, cwd: Path | None = None) -> str:
    """What a process of Python prints, which imports what this one does and ends well."""
    env = environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, *args], env=env, cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout
