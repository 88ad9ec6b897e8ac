"""What updates learn from: the frames of this process's environments, and its part of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from qsm_lightning import durable, sharding
from qsm_lightning.distributed import Ranks
from qsm_lightning.errors import require
from qsm_lightning.replay import Chunk, FrameBuffer, ReplayArchive, copies_in, make_replay_buffer


class Experience:
    """The replay buffer of a rank and, where there is one, a dataset beside it.

    Args:
        ranks: the processes of the run, which share frames equally.
        buffer_size: capacity in frames, over all ranks.
        seed: gives the seed of the buffer's sampler. It is asked whenever a buffer is made, as the seed goes with the
            frame from which a rank without a saved generator goes on.
        copies: how many environments take turns in the buffer.
        window: frames of a sample that follow each other.
        offline_share: the part of a minibatch that is the dataset's.
        save_frames: whether checkpoints hold the buffer's frames.
        folder: where to keep the buffer's frames in files mapped into memory, an empty folder; in memory by default.
        device: where to keep frames if not in files.

    Attributes:
        buffer: the frames collected.
        offline: those of the dataset; None without one.
    """

    def __init__(
        self,
        ranks: Ranks,
        buffer_size: int,
        seed: Callable[[], int],
        *,
        copies: int = 1,
        window: int = 1,
        offline_share: float = 0.5,
        save_frames: bool = True,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._ranks = ranks
        self._buffer_size = buffer_size
        self._seed = seed
        self._copies = copies
        self._window = window
        self._offline_share = offline_share
        self._save_frames = save_frames
        self._folder = folder
        self._device = device
        self._archive: ReplayArchive | None = None
        self.buffer = self._new_buffer(ranks.share(buffer_size))
        self.offline: FrameBuffer | None = None

    def _new_buffer(self, capacity: int) -> FrameBuffer:
        folder = str(self._folder) if self._folder else None
        return make_replay_buffer(capacity, folder, self._seed(), self._copies, self._device)

    def add_dataset(self, frames: TensorDictBase, seed: int, name: str) -> None:
        """Learn from this rank's part of a dataset as well.

        Args:
            frames: the whole of it.
            seed: of its sampler.
            name: its name, for messages.

        Raises:
            SettingError: for windows, if its frames are in no order of time.
        """
        mine = self._ranks.part(len(frames))  # in one piece, as frames may have to follow each other
        part, copies = frames[mine.start : mine.stop], 1
        if self._window > 1:
            copies, going_on = copies_in(part)
            require(
                going_on > 0.5,
                f"data.dataset is {name!r}: {going_on:.0%} of its transitions begin where the one before ended, and "
                "model.loss.window looks ahead; put them in the order of time",
            )
        self.offline = make_replay_buffer(len(part), None, seed, copies, self._device)
        self.offline.extend(part)

    def sample(self, count: int) -> TensorDictBase:
        """A minibatch [count]: of what was collected, or with the dataset's share."""
        if self.offline is None:
            return self._drawn(self.buffer, count)
        collected = min(count - round(self._offline_share * count), len(self.buffer))
        parts = [self._drawn(self.offline, count - collected)]
        if collected:
            parts.append(self._drawn(self.buffer, collected))
        return TensorDict.cat(parts)

    def _drawn(self, buffer: FrameBuffer, count: int) -> TensorDictBase:
        return buffer.sample(count) if self._window == 1 else buffer.sample_windows(count, self._window)

    # State.

    def save(self, folder: Path) -> dict[str, durable.Record]:
        """Write the frames added since the last call into ``folder``; returns the files of the whole buffer.

        Raises:
            OSError: when the disk is full or cannot be written.
        """
        if not self._save_frames:
            return {}
        if self._archive is None or self._archive.folder != folder:
            self._archive = ReplayArchive(folder, self._ranks.rank)
        chunks = self._archive.save(self.buffer) if len(self.buffer) else []
        return {chunk.file: chunk.record for chunk in chunks}

    def state(self) -> dict[str, Any]:
        """What :meth:`load` asks for, right after :meth:`save`.

        Returns:
            generators of the two samplers; the files that hold the buffer's frames, or None where these are not saved;
            how many frames were ever written to it; and its capacity.
        """
        chunks = self._archive.chunks if self._archive is not None and self._save_frames else None
        return {
            "sampler": self.buffer._rng.get_state(),
            "offline_sampler": None if self.offline is None else self.offline._rng.get_state(),
            "replay": None if chunks is None else [astuple(chunk) for chunk in chunks],
            "written": self.buffer.write_count,
            "capacity": self.buffer.storage.max_size,
        }

    def load(self, mine: dict[str, Any], saved: list[dict[str, Any]], folder: Path) -> None:
        """Put every frame where it was and go on with the samplers; or take a part of another number of ranks' frames.

        Args:
            mine: what :meth:`state` gave, or what of it another number of ranks hands down.
            saved: the states of all ranks that saved.
            folder: where their frames are.
        """
        if mine["replay"] is not None and len(saved) == self._ranks.count:
            # One that was put together from other ranks' frames may hold more than its share; older states do not say.
            if mine.get("capacity", self.buffer.storage.max_size) != self.buffer.storage.max_size:
                self.buffer = self._new_buffer(mine["capacity"])
            chunks = [Chunk(*fields) for fields in mine["replay"]]
            self._archive = ReplayArchive(folder, self._ranks.rank, chunks)
            self._archive.load(self.buffer, mine["written"])
        elif mine["replay"] is not None:
            frames, capacity = sharding.part_of_frames(saved, folder, self._ranks, self._buffer_size)
            self.buffer = self._new_buffer(max(capacity, self._ranks.share(self._buffer_size)))
            for piece in frames:
                self.buffer.extend(piece)
        if mine["sampler"] is not None:
            self.buffer._rng.set_state(mine["sampler"])
        if self.offline is not None and mine["offline_sampler"] is not None:
            self.offline._rng.set_state(mine["offline_sampler"])
