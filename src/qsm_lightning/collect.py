"""Collection of experience: TorchRL's collector with a random warm-up, and what is counted while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
        self._carrier = TensorDict(state["carrier"], self.env.batch_size, device=self._carrier.device)

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
