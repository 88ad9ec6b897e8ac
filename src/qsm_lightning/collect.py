"""Collection of experience: TorchRL's collector with a random warm-up, and what is counted while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from qsm_lightning.envs import GuardedGymWrapper, gym_copies
from qsm_lightning.policy import Policy


def make_collector(
    env: EnvBase, policy: TensorDictModuleBase, frames_per_batch: int, init_random_frames: int
) -> Collector:
    """An endless collector yielding chunks of ``frames_per_batch`` frames, stepped in this process.

    Every chunk that begins before ``init_random_frames`` takes uniform actions. The policy is used as it is, not
    copied, so it always acts with the current weights.
    """
    whole_chunks = math.ceil(init_random_frames / frames_per_batch) * frames_per_batch
    return GymCollector(
        env,
        policy,
        frames_per_batch=frames_per_batch,
        total_frames=-1,
        init_random_frames=whole_chunks,
        trust_policy=True,
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )


class GymCollector(Collector):
    """TorchRL's collector with a short way for gymnasium's environments in this process and this package's policies.

    The frames are bitwise the same, and what a checkpoint keeps as well. Of a frame it gives what is stored and counted
    (observation, action, next: observation, reward, terminated, done, episode_reward, step_count), in order of time.
    """

    def rollout(self) -> TensorDictBase:
        copies = gym_copies(self.env)
        if copies is None or not isinstance(self._orig_policy, Policy) or self._should_use_random_frames():
            return super().rollout()
        return self._short_rollout(copies, self._orig_policy)

    def iterator(self) -> Iterator[TensorDictBase]:
        while True:
            self._iter += 1
            chunk = self.rollout()
            self._increment_frames(chunk.numel())
            yield chunk

    _carrier: TensorDictBase

    def _short_rollout(self, copies: list[GuardedGymWrapper], policy: Policy) -> TensorDict:
        n, steps = len(copies), self.frames_per_batch  # TorchRL's attribute counts each copy's
        now = {key: self._carrier[key].view(n, -1).numpy() for key in ("observation", "episode_reward", "step_count")}
        observation = np.empty((steps + 1, *now["observation"].shape), np.float32)
        following = np.empty_like(observation[:steps])
        action = np.empty((steps, n, self.env.action_spec.shape[-1]), np.float32)
        reward, returns = np.empty((2, steps, n, 1), np.float32)
        terminated, truncated, done = np.empty((3, steps, n, 1), np.bool_)
        counts = np.empty((steps, n, 1), np.int64)
        observation[0] = now["observation"]
        episode_reward, step_count = now["episode_reward"].copy(), now["step_count"].copy()
        for t in range(steps):
            seen = torch.tensor(observation[t])  # a copy: how memory is aligned may change the last bit of a product
            action[t] = policy.checked_action(seen).numpy()
            for i, env in enumerate(copies):
                reward[t, i], terminated[t, i], truncated[t, i] = env.step_array(action[t, i], following[t, i])
            done[t] = terminated[t] | truncated[t]
            episode_reward += reward[t]
            step_count += 1
            observation[t + 1], returns[t], counts[t] = following[t], episode_reward, step_count
            for i in np.flatnonzero(done[t]).tolist():
                copies[i].reset_array(observation[t + 1, i])
                episode_reward[i], step_count[i] = 0, 0
        never = np.zeros((n, 1), np.bool_)
        self._carrier = _tensors(
            {"observation": observation[steps], "episode_reward": episode_reward, "step_count": step_count}
            | {"action": action[-1], **{key: never.copy() for key in ("terminated", "truncated", "done")}},
            self.env.batch_size,
        )
        following_step = {"observation": following, "reward": reward, "terminated": terminated, "done": done}
        following_step |= {"episode_reward": returns, "step_count": counts}
        frames = [steps * n]
        chunk = _tensors({"observation": observation[:steps], "action": action}, frames)
        return chunk.set("next", _tensors(following_step, frames))


def _tensors(arrays: dict[str, np.ndarray], batch_size: Sequence[int]) -> TensorDict:
    """Arrays [..., d] as tensors [*batch_size, d]."""
    tensors = {key: torch.from_numpy(array).view(*batch_size, array.shape[-1]) for key, array in arrays.items()}
    return TensorDict(tensors, batch_size)


@cache
def as_written(number: float) -> Fraction:
    """0.1 is a tenth."""
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
    """

    frames: int = 0
    updates: int = 0
    episodes: int = 0
    evaluated: int = 0
    skipped: int = 0
    env_restarts: int = 0

    def updates_owed(self, utd: float, init_random_frames: int) -> int:
        """Updates still to do so that their number is floor(utd * (frames - warm-up)) in all, exactly."""
        learning_frames = max(0, self.frames - init_random_frames - self.skipped)
        return max(0, math.floor(as_written(utd) * learning_frames) - self.updates)

    def refill(self, utd: float) -> None:
        """From an empty buffer updates go on as if as many frames as the warm-up were still to come."""
        worth = math.ceil(self.updates / as_written(utd))  # frames whose updates are done
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
        following = chunk["next"]
        done = following["done"].view(-1)
        self.frames += chunk.numel()
        self.at_bounds += (chunk["action"].abs() > 0.999).float().mean(-1).sum().item()
        if not done.any():
            return 0
        self.returns += following["episode_reward"].view(-1)[done].tolist()
        self.lengths += following["step_count"].view(-1)[done].tolist()
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
        out = {"actions_at_bounds": self.at_bounds / max(1, self.frames)}
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
