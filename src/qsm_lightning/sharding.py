"""Going on with another number of processes: the state of each rank and the replay frames, shared out anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from qsm_lightning.distributed import Ranks
from qsm_lightning.progress import RecentExperience
from qsm_lightning.replay import ReplayArchive, kept_chunks


def adopt(saved: list[dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """A rank's state from the states of another number of ranks, the replay frames apart.

    A rank that was there before keeps its environments and generators; one that was not begins its own. What was
    counted by ranks that are no longer there goes to those that are. Updates that a signal left undone are cut into as
    many parts as there are ranks now.

    Args:
        saved: the states of all ranks, as :meth:`OffPolicyDataModule.state_dict` has them.
        ranks: the ranks there are now.
    """
    mine = (
        saved[ranks.rank]
        if ranks.rank < len(saved)
        else saved[0] | dict.fromkeys(("generators", "sampler", "offline_sampler", "envs"))
    )
    heirs = saved[ranks.rank :: ranks.count]
    counts = {
        "episodes": sum(one["progress"]["episodes"] for one in heirs),
        "env_restarts": max((one["progress"]["env_restarts"] for one in heirs), default=0),
    }
    recent = asdict(RecentExperience.of_all(RecentExperience(**one["recent"]) for one in heirs))
    return mine | {"progress": mine["progress"] | counts, "recent": recent, "owed": _owed(saved, ranks)}


def _owed(saved: list[dict[str, Any]], ranks: Ranks) -> Any:
    if saved[0]["owed"] is None:
        return None
    count = saved[0]["owed"][1]
    if count == 0:
        return saved[0]["owed"]
    parts = [TensorDict(one["owed"][0]).auto_batch_size_(2) for one in saved]
    whole = TensorDict.cat(parts, 1)  # [u, batch_size]
    mine = ranks.part(whole.shape[1])
    return whole[:, mine.start : mine.stop].clone().to_dict(), count


def part_of_frames(
    saved: list[dict[str, Any]], folder: Path, ranks: Ranks, buffer_size: int
) -> tuple[Iterator[TensorDict], int]:
    """A rank's part of the frames that all ranks' buffers held, oldest first, and how many they are at most.

    File by file in the order of time, every ``ranks.count``-th frame goes to this rank: none is left out, none is
    taken twice, and no more than a file is in memory at a time.

    Args:
        saved: the states of all ranks.
        folder: where the files of frames are.
        ranks: the ranks there are now.
        buffer_size: capacity of all saved buffers, where their states do not tell it.
    """
    chunks = sorted(kept_chunks(saved, buffer_size), key=lambda item: (item[1].first, item[0]))
    total = sum(chunk.stop - chunk.first - lost for _, chunk, lost in chunks)

    def pieces() -> Iterator[TensorDict]:
        position = 0
        for rank, chunk, lost in chunks:
            frames = ReplayArchive(folder, rank).read(chunk)[lost:]
            first = (ranks.rank - position) % ranks.count
            position += len(frames)
            if first < len(frames):
                yield frames[first :: ranks.count]

    return pieces(), ranks.share(total)
