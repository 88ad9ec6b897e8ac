"""The replay buffer: TorchRL's, its storage, and how its content is saved."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

Storage = Literal["memory", "memmap"]

# Each stored frame: what an off-policy loss may read. Everything else a collector writes is left out.
FRAME_KEYS = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "terminated"),
    ("next", "done"),
)


def make_replay_buffer(size: int, folder: str | None = None, seed: int = 0) -> TensorDictReplayBuffer:
    """A ring of ``size`` frames sampled uniformly, by a generator of its own.

    Args:
        size: capacity in frames.
        folder: where to keep the frames in files mapped into memory, an empty folder; in memory by default.
        seed: seed of the sampler.
    """
    frames = LazyTensorStorage(size) if folder is None else LazyMemmapStorage(size, scratch_dir=folder)
    buffer = TensorDictReplayBuffer(storage=frames)
    buffer.set_rng(torch.Generator().manual_seed(seed))
    return buffer


def buffer_state(buffer: TensorDictReplayBuffer) -> dict[str, Any]:
    """Stored frames and cursor, as plain tensors and integers."""
    frames = buffer[:].select(*FRAME_KEYS).clone() if len(buffer) else TensorDict()
    return {
        "frames": dict(frames.flatten_keys(".").items()),
        "cursor": buffer.write_count % buffer.storage.max_size,
    }


def load_buffer_state(buffer: TensorDictReplayBuffer, state: dict[str, Any]) -> None:
    """Refill an empty buffer from :func:`buffer_state`; a smaller buffer keeps the newest frames."""
    if not state["frames"]:
        return
    frames = TensorDict(state["frames"]).auto_batch_size_(1).unflatten_keys(".")
    ages = torch.arange(len(frames)).roll(-state["cursor"] if state["cursor"] < len(frames) else 0)
    buffer.extend(frames[ages][-buffer.storage.max_size :])  # oldest first
