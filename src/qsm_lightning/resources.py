"""Whether the replay buffer will fit: asked before the first frame, not answered by a crash a day later."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from qsm_lightning import checkpoints, runs
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import require
from qsm_lightning.replay import frame_bytes

CGROUP = Path("/sys/fs/cgroup")


def report(data: OffPolicyDataModule, run: Path, saved: bool) -> str:
    """One line on the size of the replay buffer.

    Args:
        data: the datamodule, before training.
        run: the run's folder.
        saved: whether checkpoints are written.

    Raises:
        SettingError: when memory or disk is too small for it.
    """
    frames = min(data.buffer_size, data.total_frames)
    size = frames * frame_bytes(data.observation_dim, data.action_dim)
    mapped = data.storage == "memmap"
    if not mapped:
        free = available_memory()
        require(
            size <= free,
            f"data.buffer_size is {data.buffer_size}: {frames} frames of {data.env_name} take {_size(size)} of memory, "
            f"and {_size(free)} is free; lower it, or set data.storage to memmap",
        )
    disk: dict[Path, int] = {}
    if mapped:
        disk[Path(data.storage_dir or run)] = size
    if saved and data.save_buffer:
        there = sum(path.stat().st_size for path in (run / runs.CHECKPOINTS / checkpoints.REPLAY).glob("*"))
        disk[run] = disk.get(run, 0) + max(0, size - there)
    for folder, needed in disk.items():
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        require(
            needed <= free,
            f"data.buffer_size is {data.buffer_size}: {frames} frames of {data.env_name} take {_size(needed)} of disk "
            f"at {folder}, and {_size(free)} is free; lower it, free some, set data.save_buffer to false, or choose "
            "another trainer.default_root_dir or data.storage_dir",
        )
    where = "mapped files" if mapped else "memory"
    on_disk = f", as much again in {run / runs.CHECKPOINTS}" if saved and data.save_buffer else ""
    return f"replay buffer: {frames} frames, {_size(size)} in {where}{on_disk}"


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free, or less where a container is limited."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            free = min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no container, or one of another kind
    return free


def _size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"
