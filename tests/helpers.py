"""What several test files share: a replay batch, the shipped configurations and how they are shrunk."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tensordict import TensorDict

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))
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


def environment() -> dict[str, str]:
    """This process's environment with one thread, wide lines, and tests/ importable by name."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
