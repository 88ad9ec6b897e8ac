"""The data side of training: collect k frames -> extend the buffer -> sample the updates these frames are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from pytorch_lightning import LightningDataModule, Trainer
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from qsm_lightning.collect import Progress, RecentExperience, check_finite, make_collector
from qsm_lightning.envs import make_env
from qsm_lightning.errors import TrainingFault, require, require_positive
from qsm_lightning.evaluation import run_episodes
from qsm_lightning.losses import OffPolicyLoss
from qsm_lightning.replay import FRAME_KEYS, Storage, buffer_state, load_buffer_state, make_replay_buffer
from qsm_lightning.seeding import Purpose, derive_seed, global_seed

SELECTORS = ("sample", "best_of_n")


def datamodule_of(trainer: Trainer) -> OffPolicyDataModule:
    """The trainer's datamodule; with another kind this package's module and callbacks cannot work."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, OffPolicyDataModule), f"needs an OffPolicyDataModule, not {type(data).__name__}"
    return data


class SizedStream:
    """An endless iterable with a length, which Lightning neither prefetches nor copies."""

    def __init__(self, length: int, make: Callable[[], Any]) -> None:
        self.length = length
        self.make = make

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.make()


class OffPolicyDataModule(LightningDataModule):
    """Environment, collector, replay buffer and evaluation episodes.

    Each training batch is a TensorDict [u, batch_size]: the u updates that a chunk of new frames is worth. Frames are
    the clock: an epoch is one evaluation period, and training stops at the first chunk that reaches ``total_frames``.
    With several ranks, all frame counts are over all ranks; each rank has environments and a buffer of its own.

    Args:
        env: a gymnasium id (Hopper-v5), dmc:domain/task, or envpool:id.
        num_envs: copies of the environment on each rank, stepped together.
        frames_per_batch: frames collected between rounds of updates, a multiple of num_envs; num_envs by default.
        total_frames: frames to train for.
        init_random_frames: frames of uniform random actions before the first update, at least batch_size.
        batch_size: frames per gradient update, on each rank.
        buffer_size: capacity of the replay buffer in frames.
        storage: where the buffer lives: memory, or memmap (files mapped into memory).
        storage_dir: folder in which memmap makes its own, removed at the end; trainer.default_root_dir by default.
        utd: gradient updates per frame; may be a fraction.
        eval_every_frames: frames between evaluations (an epoch), rounded up to whole batches.
        eval_episodes: episodes of each evaluation, from the same starts every time.
        eval_selector: evaluate one sample per step, the best_of_n samples by the smaller critic, or both; with both,
            eval/return is sample's.
        eval_candidates: n of best_of_n.

    Raises:
        SettingError: for a value out of range or an environment that cannot be used.
    """

    def __init__(
        self,
        env: str = "Pendulum-v1",
        num_envs: int = 1,
        frames_per_batch: int | None = None,
        total_frames: int = 1_000_000,
        init_random_frames: int = 10_000,
        batch_size: int = 256,
        buffer_size: int = 1_000_000,
        storage: Storage = "memory",
        storage_dir: str | None = None,
        utd: float = 1.0,
        eval_every_frames: int = 5_000,
        eval_episodes: int = 10,
        eval_selector: Literal["sample", "best_of_n", "both"] = "both",
        eval_candidates: int = 32,
    ) -> None:
        super().__init__()
        settings = {
            "num_envs": num_envs,
            "total_frames": total_frames,
            "batch_size": batch_size,
            "buffer_size": buffer_size,
            "utd": utd,
            "eval_every_frames": eval_every_frames,
            "eval_episodes": eval_episodes,
            "eval_candidates": eval_candidates,
        }
        require_positive(**{f"data__{name}": value for name, value in settings.items()})
        self.frames_per_batch = frames_per_batch or num_envs
        require(
            frames_per_batch is None or (frames_per_batch > 0 and frames_per_batch % num_envs == 0),
            f"data.frames_per_batch is {frames_per_batch}: it must be a multiple of data.num_envs ({num_envs}), "
            f"such as {max(1, round((frames_per_batch or 0) / num_envs)) * num_envs}",
        )
        require(
            init_random_frames >= batch_size,
            f"data.batch_size is {batch_size}: it must not exceed the warm-up, data.init_random_frames "
            f"({init_random_frames})",
        )
        require(
            total_frames > init_random_frames,
            f"data.total_frames is {total_frames}: nothing would be learned, as the warm-up, data.init_random_frames, "
            f"takes {init_random_frames}; give a greater number",
        )
        require(
            buffer_size >= batch_size,
            f"data.buffer_size is {buffer_size}: it must be at least data.batch_size ({batch_size})",
        )
        self.save_hyperparameters()
        self.env_name = env
        self.total_frames = total_frames
        self.init_random_frames = init_random_frames
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.storage = storage
        self.storage_dir = storage_dir
        self.utd = utd
        self.eval_every_frames = eval_every_frames
        self.eval_episodes = eval_episodes
        self.eval_selectors = SELECTORS if eval_selector == "both" else (eval_selector,)
        self.eval_candidates = eval_candidates
        self.env = make_env(env, num_envs)
        self.observation_dim = self.env.observation_spec["observation"].shape[-1]
        self.action_dim = self.env.action_spec.shape[-1]
        self.progress = Progress()
        self.recent = RecentExperience()
        self._eval_env: EnvBase | None = None
        self._files: TemporaryDirectory[str] | None = None
        self._chunks: Iterator[TensorDictBase] | None = None

    # What Lightning asks for.

    def setup(self, stage: str) -> None:
        """Seed and build collector and buffer, once."""
        assert self.trainer is not None
        if stage == "fit" and self._chunks is None:
            self._start()

    def _start(self) -> None:
        """Seed for the present frame, build the collector and an empty buffer."""
        assert self.trainer is not None
        seed, rank, self._ranks = global_seed(), self.trainer.global_rank, self.trainer.world_size
        frames = self.progress.frames
        self.env.set_seed(derive_seed(seed, rank, Purpose.TRAIN_ENV, frames))
        torch.manual_seed(derive_seed(seed, rank, Purpose.NOISE, frames))
        self.collector = make_collector(
            self.env,
            self._loss.exploration_policy(),
            self.frames_per_batch,
            math.ceil(max(0, self.init_random_frames - frames) / self._ranks),
        )
        if self.storage == "memmap":
            folder = Path(self.storage_dir or self.trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._files = TemporaryDirectory(prefix="replay-", dir=folder)
        self.buffer = make_replay_buffer(
            math.ceil(self.buffer_size / self._ranks),
            self._files.name if self._files else None,
            derive_seed(seed, rank, Purpose.SAMPLER, frames),
        )
        self._chunks = iter(self.collector)

    def train_dataloader(self) -> SizedStream:
        """Batches of updates; its length is one evaluation period."""
        chunks = math.ceil(self.eval_every_frames / (self.frames_per_batch * self._ranks))
        return SizedStream(chunks, self.next_batch)

    def val_dataloader(self) -> SizedStream:
        """One batch: the evaluated episodes of each selector."""
        return SizedStream(1, self.evaluate)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device) if isinstance(batch, TensorDictBase) else batch

    # Data flow.

    @property
    def _loss(self) -> OffPolicyLoss:
        assert self.trainer is not None
        return cast(OffPolicyLoss, self.trainer.lightning_module.loss)

    def next_batch(self) -> TensorDictBase:
        """Collect a chunk, store it, and sample the updates it is worth: [u, batch_size], u = 0 in the warm-up."""
        assert self._chunks is not None
        assert self.trainer is not None
        with self._fault_tells_frame():
            chunk = next(self._chunks)
        chunk = (chunk.transpose(0, 1) if chunk.ndim == 2 else chunk).reshape(-1)  # in the order of time
        check_finite(chunk, self.progress.frames)
        self.progress.frames += chunk.numel() * self._ranks
        self.progress.episodes += self.recent.add(chunk)
        self.buffer.extend(chunk.select(*FRAME_KEYS))
        if self.progress.frames >= self.total_frames:
            self.trainer.should_stop = True
        updates = self.progress.updates_owed(self.utd, self.init_random_frames)
        self.progress.updates += updates
        if updates == 0:
            return TensorDict(batch_size=[0, self.batch_size])
        return self.buffer.sample(updates * self.batch_size).select(*FRAME_KEYS).reshape(updates, self.batch_size)

    def evaluate(self) -> dict[str, dict[str, torch.Tensor]]:
        """Evaluated episodes of each selector: {selector: {return: [E], length: [E]}}."""
        if self._eval_env is None:
            self._eval_env = make_env(self.env_name, self.eval_episodes)
        seeds = [derive_seed(global_seed(), 0, purpose) for purpose in (Purpose.EVAL_ENV, Purpose.EVAL_NOISE)]
        episodes = {}
        for selector in self.eval_selectors:
            policy = self._loss.evaluation_policy(selector, self.eval_candidates)
            with self._fault_tells_frame():
                episodes[selector] = run_episodes(self._eval_env, policy, *seeds)
        return episodes

    @contextmanager
    def _fault_tells_frame(self) -> Iterator[None]:
        try:
            yield
        except TrainingFault as fault:
            raise TrainingFault(f"{fault}, after frame {self.progress.frames}") from fault

    def take_recent(self) -> RecentExperience:
        """What was collected since the last call."""
        recent, self.recent = self.recent, RecentExperience()
        return recent

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Counters and the replay buffer, as plain tensors and numbers."""
        if self._chunks is None:
            return {}
        return {"progress": asdict(self.progress), "buffer": buffer_state(self.buffer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._chunks is None:
            return
        self.progress = Progress(**state_dict["progress"])
        self._start()  # with new noise and new episodes, and no second warm-up
        load_buffer_state(self.buffer, state_dict["buffer"])

    def teardown(self, stage: str) -> None:
        """Close the environments and remove the mapped files when training ends."""
        for env in (self.env, self._eval_env):
            if env is not None and not env.is_closed:
                env.close(raise_if_closed=False)
        if self._files is not None:
            self._files.cleanup()
