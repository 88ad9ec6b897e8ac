"""What a run counts: frames, updates, episodes, and what happened in the frames since the last row of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import numpy as np
from tensordict import TensorDictBase


@cache
def exact_fraction(number: float) -> Fraction:
    """The decimal that was written: 1/10 for 0.1, whose float is slightly more."""
    return Fraction(str(number))


@dataclass
class Progress:
    """The clock of a run: what a process has counted.

    Args:
        frames: environment frames over all ranks.
        updates: gradient updates.
        episodes: this rank's finished episodes.
        evaluated: frame of the last evaluation.
        skipped: frames that are worth no updates: the ones that refill a buffer which was not saved.
        env_restarts: how often this rank's environments were built anew.
        batches: Lightning's training batches that have ended.
    """

    frames: int = 0
    updates: int = 0
    episodes: int = 0
    evaluated: int = 0
    skipped: int = 0
    env_restarts: int = 0
    batches: int = 0

    def updates_owed(self, utd: float, init_random_frames: int) -> int:
        """Updates still to do so that their number is floor(utd * (frames - warm-up)) in all, exactly."""
        learning_frames = max(0, self.frames - init_random_frames - self.skipped)
        return max(0, math.floor(exact_fraction(utd) * learning_frames) - self.updates)

    def refill(self, utd: float) -> None:
        """From an empty buffer updates go on as if as many frames as the warm-up were still to come."""
        worth = math.ceil(self.updates / exact_fraction(utd))  # frames whose updates are done
        self.skipped = self.frames - worth


@dataclass
class RecentExperience:
    """What happened in the frames since it was last taken: episodes, actions at their bounds, age of the weights."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    frames: int = 0
    at_bounds: float = 0.0
    staleness: list[int] = field(default_factory=list)  # of each chunk, where workers collect

    def add(self, chunk: TensorDictBase) -> int:
        """Account for a chunk [frames]; returns the number of episodes that ended in it."""
        following, action = chunk["next"], chunk["action"].numpy()
        done = following["done"].view(-1).numpy()
        self.frames += len(action)
        self.at_bounds += int(np.count_nonzero(np.abs(action) > 0.999)) / action.shape[-1]
        if not done.any():
            return 0
        self.returns += following["episode_reward"].view(-1).numpy()[done].tolist()
        self.lengths += following["step_count"].view(-1).numpy()[done].tolist()
        return int(done.sum())

    @classmethod
    def of_all(cls, parts: Iterable[RecentExperience]) -> RecentExperience:
        """What happened on several ranks together."""
        whole = cls()
        for part in parts:
            whole.returns += part.returns
            whole.lengths += part.lengths
            whole.frames += part.frames
            whole.at_bounds += part.at_bounds
            whole.staleness += part.staleness
        return whole

    def metrics(self) -> dict[str, float]:
        """Means; return and length only when an episode ended, staleness only where workers collect."""
        out = {"actions_at_bounds": self.at_bounds / self.frames} if self.frames else {}
        if self.returns:
            out |= {
                "return": sum(self.returns) / len(self.returns),
                "length": sum(self.lengths) / len(self.lengths),
            }
        if self.staleness:
            out |= {
                "staleness": sum(self.staleness) / len(self.staleness),
                "staleness_max": max(self.staleness),
            }
        return out
