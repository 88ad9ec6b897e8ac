"""Pendulum-v1 with its rewards in another unit, as environments for a sweep.

A rule for M_q that does not depend on the unit has the same returns, divided by it, in all of them (add
``--model.loss.score_at noisy`` for QSM as published, and for the earlier rule ``--model.loss.m_q_slope 0.15`` too)::

    unit=benchmarks.scaled_pendulum
    PYTHONPATH=. qsm-sweep --config pendulum --vary data.env=Pendulum-v1,$unit:Pendulum100-v1,$unit:Pendulum0.01-v1 \\
        --vary model.loss.m_q=auto,1 --seeds 0 --data.total_frames 15000 --data.eval_selector sample \\
        --model.compile true
"""

from __future__ import annotations

from functools import partial

import gymnasium as gym
from gymnasium.wrappers import TransformReward


def scaled(unit: float, render_mode: str | None = None) -> gym.Env:
    """Pendulum-v1 with rewards ``unit`` times as large."""
    return TransformReward(gym.make("Pendulum-v1", render_mode=render_mode), lambda reward: unit * float(reward))


for unit in (0.01, 100):
    gym.register(f"Pendulum{unit:g}-v1", entry_point=partial(scaled, unit))
