"""Collection of experience: TorchRL's collector with a random warm-up, and what is counted while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from qsm_lightning.env_state import env_states, load_env_states
from qsm_lightning.envs import GuardedGymWrapper, gym_copies
from qsm_lightning.policy import Policy


def make_collector(
    env: EnvBase, policy: TensorDictModuleBase, frames_per_batch: int, init_random_frames: int
) -> GymCollector:
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
    (observation, action, next: observation, reward, terminated, done, episode_reward, step_count). Chunks are [frames],
    in order of time, and the next one is written over the last.
    """

    def rollout(self) -> TensorDictBase:
        copies = gym_copies(self.env)
        if copies is None or not isinstance(self._orig_policy, Policy) or self._should_use_random_frames():
            return in_order_of_time(super().rollout())
        return self._short_rollout(copies, self._orig_policy)

    def iterator(self) -> Iterator[TensorDictBase]:
        while True:
            self._iter += 1
            chunk = self.rollout()
            self._increment_frames(chunk.numel())
            yield chunk

    _carrier: TensorDictBase
    _room: Room | None = None

    def env_state(self) -> dict[str, Any]:
        """Where the environments are in their episodes, as plain data.

        Raises:
            NoStateError: if one of them cannot tell.
        """
        return {"envs": env_states(self.env), "carrier": self._carrier.clone().to_dict()}

    def load_env_state(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`env_state` gave, after a reset.

        Raises:
            NoStateError: if an environment cannot.
        """
        load_env_states(self.env, state["envs"])
        carrier = TensorDict(state["carrier"], self.env.batch_size)
        self._carrier = carrier if self._carrier.device is None else carrier.to(self._carrier.device)

    def _short_rollout(self, copies: list[GuardedGymWrapper], policy: Policy) -> TensorDict:
        room = self._room
        if room is None:  # TorchRL's attribute counts each copy's frames
            self._room = room = Room(self.frames_per_batch, self.env)
        if self._carrier is not room.carrier:  # TorchRL's own way, or a checkpoint, has made it
            room.carrier.update_(self._carrier)
            self._carrier = room.carrier
        now, seen, chunk = room.now, room.seen, room.following
        for t in range(self.frames_per_batch):
            seen["observation"][t] = now["observation"]
            # copied: how memory is aligned may change the last bit of a product, and environments may keep an action
            action = policy.checked_action(torch.tensor(now["observation"])).numpy()
            seen["action"][t] = now["action"][:] = action
            for i, env in enumerate(copies):
                reward, terminated, truncated = env.step_array(action[i], now["observation"][i])
                chunk["observation"][t, i], chunk["reward"][t, i] = now["observation"][i], reward
                chunk["terminated"][t, i], chunk["done"][t, i] = terminated, terminated or truncated
                now["episode_reward"][i] += chunk["reward"][t, i]
                now["step_count"][i] += 1
            chunk["episode_reward"][t], chunk["step_count"][t] = now["episode_reward"], now["step_count"]
            for i in np.flatnonzero(chunk["done"][t]).tolist():
                copies[i].reset_array(now["observation"][i])
                now["episode_reward"][i], now["step_count"][i] = 0, 0
        return room.chunk


class Room:
    """Memory that a collector fills again and again, as arrays and as TensorDicts.

    Attributes:
        seen: observation [steps, copies, O] and action [steps, copies, A] of a chunk.
        following: what came next, [steps, copies, d].
        now: where the environments are, [copies, d].
        chunk: ``seen`` and ``following``, [steps * copies].
        carrier: ``now``, with the batch size of the environments.
    """

    def __init__(self, steps: int, env: EnvBase) -> None:
        observation, action = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
        count, flag = env.batch_size.numel(), np.bool_
        seen = {"observation": (observation, np.float32), "action": (action, np.float32)}
        counts = {"episode_reward": (1, np.float32), "step_count": (1, np.int64)}
        following = {"observation": seen["observation"], "reward": (1, np.float32), "terminated": (1, flag)}
        flags = {"terminated": (1, flag), "truncated": (1, flag), "done": (1, flag)}

        def arrays(kinds: dict[str, tuple[int, Any]], *shape: int) -> dict[str, np.ndarray]:
            return {key: np.zeros((*shape, width), dtype) for key, (width, dtype) in kinds.items()}

        self.seen = arrays(seen, steps, count)
        self.following = arrays(following | {"done": (1, flag)} | counts, steps, count)
        self.now = arrays(seen | counts | flags, count)
        frames = [steps * count]
        self.chunk = _tensors(self.seen, frames).set("next", _tensors(self.following, frames))
        self.carrier = _tensors(self.now, env.batch_size)


def _tensors(arrays: dict[str, np.ndarray], batch_size: Sequence[int]) -> TensorDict:
    """Arrays [..., d] as tensors [*batch_size, d] of the same memory."""
    tensors = {key: torch.from_numpy(array).view(*batch_size, array.shape[-1]) for key, array in arrays.items()}
    return TensorDict(tensors, batch_size)


def in_order_of_time(chunk: TensorDictBase) -> TensorDictBase:
    """A chunk [frames], or [environments, time] as TorchRL gives it for several, as [frames]."""
    return (chunk.transpose(0, 1) if chunk.ndim == 2 else chunk).reshape(-1)


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
