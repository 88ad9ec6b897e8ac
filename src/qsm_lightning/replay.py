"""The replay buffer: TorchRL's, its storage, and how its content is saved piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

from qsm_lightning import durable
from qsm_lightning.continuous import TIME_STEP
from qsm_lightning.errors import SettingError, require
from qsm_lightning.watch import beat

Storage = Literal["memory", "memmap", "device"]

# Each stored frame: what an off-policy loss may read. Everything else a collector writes is left out.
FRAME_KEYS = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "terminated"),
    ("next", "done"),
)
TIME_STEP_KEY = ("next", TIME_STEP)  # stored as well where environments tell it
CHUNK_BYTES = 16 * 2**20  # frames are written in pieces of at most this size, which bounds the memory needed


def frame_bytes(observation_dim: int, action_dim: int, timed: bool = False) -> int:
    """Bytes of a stored frame: two observations, action and reward in float32, two flags; and its time step."""
    return 4 * (2 * observation_dim + action_dim + 1 + timed) + 2


def frame_keys(frames: TensorDictBase) -> tuple[NestedKey, ...]:
    """What of frames is stored: :data:`FRAME_KEYS`, and their time steps where they have them."""
    return (*FRAME_KEYS, TIME_STEP_KEY) if TIME_STEP in frames["next"] else FRAME_KEYS


class FrameBuffer(ReplayBuffer):
    """TorchRL's ring of frames, sampled uniformly: the same content and samples, by a fraction of the Python.

    It takes no transforms and no prefetching.

    Attributes:
        copies: how many environments take turns in it.
        keys: what is stored of a frame.
    """

    copies = 1
    keys: tuple[NestedKey, ...] = FRAME_KEYS

    def extend(self, data: TensorDictBase, **kwargs: Any) -> None:
        """Add frames [n], of which :func:`frame_keys` are kept, after the last ones, over the oldest when full."""
        storage, writer, n = self._storage, self._writer, len(data)
        first = writer._cursor
        if not storage.initialized:
            self.keys = frame_keys(data)
        if not storage.initialized or first + n > storage.max_size:
            super().extend(data.select(*self.keys), **kwargs)
            return
        for mine, new in zip(self._leaves, _leaves(data, self.keys), strict=True):
            mine[first : first + n] = new
        writer._cursor = (first + n) % storage.max_size
        writer._write_count += n
        storage._get_new_len(data, slice(first, first + n))

    def sample(self, batch_size: int) -> TensorDict:
        """Frames [batch_size], drawn with replacement."""
        leaves = self._leaves
        index = torch.randint(0, len(self._storage), (batch_size,), generator=self._rng)
        index = index.to(leaves[0].device, non_blocking=True)
        drawn = dict(zip(self.keys, (leaf.index_select(0, index) for leaf in leaves), strict=True))
        following = {key[1]: drawn.pop(key) for key in self.keys if isinstance(key, tuple)}
        return TensorDict({**drawn, "next": TensorDict(following, [batch_size])}, [batch_size])

    def sample_windows(self, batch_size: int, length: int) -> TensorDict:
        """Up to ``length`` frames that follow each other, from each of ``batch_size`` that are drawn with replacement.

        A frame belongs to the window while it begins in the observation in which the one before it ended, and that
        one's episode had not ended: so no window goes over the end of an episode or of the ring.

        Args:
            batch_size: number of windows.
            length: frames of the longest ones.

        Returns:
            Frames [batch_size] with leaves [batch_size, length, ...], and ``in_window`` [batch_size, length]; what is
            not in it is of other windows.
        """
        size, leaves = len(self._storage), self._leaves
        oldest = self._writer._cursor % size
        place = torch.randint(0, size, (batch_size, 1), generator=self._rng) + self.copies * torch.arange(length)
        place = place.to(leaves[0].device)
        index = (oldest + place) % size
        frames = TensorDict(dict(zip(self.keys, (leaf[index] for leaf in leaves), strict=True)), [batch_size])
        before = frames["next", "observation"][:, :-1]
        follows = (frames["observation"][:, 1:] == before).all(-1) & ~frames["next", "done"][:, :-1, 0]
        follows &= place[:, 1:] < size
        inside = torch.cat([torch.ones_like(follows[:, :1]), follows], 1).cummin(1).values
        return frames.set("in_window", inside)

    @property
    def _leaves(self) -> list[Tensor]:
        return _leaves(self._storage._storage, self.keys)


def _leaves(frames: TensorDictBase, keys: tuple[NestedKey, ...]) -> list[Tensor]:
    following = frames["next"]
    return [following[key[1]] if isinstance(key, tuple) else frames[key] for key in keys]


def copies_in(frames: TensorDictBase, most: int = 64) -> tuple[int, float]:
    """How many environments take turns in frames [n], at most ``most``, and the share of frames that then go on."""
    after, now = frames["next", "observation"], frames["observation"]
    found = {
        copies: (after[:-copies] == now[copies:]).all(-1).float().mean().item()
        for copies in range(1, min(most, len(frames) - 1) + 1)
    }
    copies = max(found, key=lambda count: found[count], default=1)
    return copies, found.get(copies, 0.0)


def make_replay_buffer(
    size: int, folder: str | None = None, seed: int = 0, copies: int = 1, device: torch.device | str = "cpu"
) -> FrameBuffer:
    """A ring of ``size`` frames sampled uniformly, by a generator of its own.

    Args:
        size: capacity in frames.
        folder: where to keep the frames in files mapped into memory, an empty folder; in memory by default.
        seed: seed of the sampler.
        copies: how many environments take turns in it, for windows of frames that follow each other.
        device: where to keep the frames if not in files.
    """
    frames = LazyTensorStorage(size, device=device) if folder is None else LazyMemmapStorage(size, scratch_dir=folder)
    buffer = FrameBuffer(storage=frames)
    buffer.set_rng(torch.Generator().manual_seed(seed))
    buffer.copies = copies
    return buffer


@dataclass(frozen=True)
class Chunk:
    """A file of consecutive frames: those written to the buffer as number ``first`` up to ``stop`` - 1."""

    first: int
    stop: int
    file: str
    record: durable.Record


def kept_chunks(saved: list[dict[str, Any]], buffer_size: int) -> list[tuple[int, Chunk, int]]:
    """The files of a checkpoint's replay frames: whose each is, and how many of its first frames the ring has lost.

    Args:
        saved: the states of all ranks.
        buffer_size: capacity of all buffers, where their states do not tell their own.
    """
    share = -(-buffer_size // len(saved))
    return [
        (rank, chunk, max(0, state["written"] - state.get("capacity", share) - chunk.first))
        for rank, state in enumerate(saved)
        for chunk in (Chunk(*fields) for fields in state["replay"] or [])
    ]


class ReplayArchive:
    """The buffer's frames as immutable files in a folder that all checkpoints of a run share.

    A save writes the frames added since the last one and nothing else; files that the ring has overwritten altogether
    are no longer listed. Who may delete them is for the checkpoints that list them to say.

    Args:
        folder: where the files are.
        rank: the process whose buffer this is; it begins the files' names.
        chunks: what is already there.
    """

    def __init__(self, folder: Path, rank: int = 0, chunks: list[Chunk] | None = None) -> None:
        self.folder = folder
        self.rank = rank
        self.chunks = chunks or []

    def save(self, buffer: ReplayBuffer) -> list[Chunk]:
        """Write what is new in ``buffer``; returns the files that hold its content, oldest first.

        Raises:
            OSError: when the disk is full or cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        total, capacity = buffer.write_count, buffer.storage.max_size
        oldest = max(0, total - capacity)
        chunks = [chunk for chunk in self.chunks if chunk.stop > oldest]
        first = max([oldest, *(chunk.stop for chunk in chunks)])
        while first < total:
            chunks.append(self._write(buffer, first, total))
            first = chunks[-1].stop
        durable.sync(self.folder)
        self.chunks = chunks
        return chunks

    def _write(self, buffer: ReplayBuffer, first: int, total: int) -> Chunk:
        """The next file: frame ``first`` and as many of those before ``total`` as it may hold."""
        one = buffer[:1]
        keys = frame_keys(one)
        size = sum(value[0].nbytes for value in one.select(*keys).values(True, True))
        beat()
        stop = min(total, first + max(1, CHUNK_BYTES // size))
        frames = buffer[torch.arange(first, stop) % buffer.storage.max_size].select(*keys)
        content = durable.packed({name: value.cpu().contiguous() for name, value in frames.flatten_keys(".").items()})
        record = durable.record_of(content)
        name = f"{self.rank}-{first:012}-{stop:012}-{record['sha256'][:12]}.pt"
        durable.write_file(self.folder / name, content)
        return Chunk(first, stop, name, record)

    def load(self, buffer: ReplayBuffer, total: int) -> None:
        """Refill an empty ``buffer`` of the same capacity: every frame where it was, and the next to write as well.

        Args:
            buffer: from :func:`make_replay_buffer`.
            total: frames ever written to the saved one.

        Raises:
            SettingError: when a file holds anything but frames.
        """
        if not self.chunks:
            return
        buffer.writer.load_state_dict(
            {"_cursor": self.chunks[0].first % buffer.storage.max_size, "_write_count": self.chunks[0].first}
        )
        for chunk in self.chunks:
            buffer.extend(self.read(chunk))
        require(
            buffer.write_count == total,
            f"{self.folder} has the first {buffer.write_count} of {total} frames that the checkpoint's buffer held; "
            "resume from another checkpoint",
        )

    def read(self, chunk: Chunk) -> TensorDict:
        """A file's frames, loaded with ``weights_only=True``: opening one runs no code."""
        path = self.folder / Path(chunk.file).name
        beat()
        try:
            frames = torch.load(path, map_location="cpu", weights_only=True)
            found = TensorDict(frames, [chunk.stop - chunk.first]).unflatten_keys(".")
            return found.select(*frame_keys(found), strict=True)
        except Exception as error:  # torch raises many kinds for a file that is not its own
            raise SettingError(
                f"{path} is not a file of replay frames, or a damaged one ({type(error).__name__}); "
                "resume from another checkpoint"
            ) from error
