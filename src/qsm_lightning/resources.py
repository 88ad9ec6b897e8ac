"""Whether the replay buffer will fit: asked before the first frame, not answered by a crash a day later."""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from qsm_lightning import checkpoints, durable, runs
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import require
from qsm_lightning.replay import frame_bytes

CPU = torch.device("cpu")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def report(
    data: OffPolicyDataModule,
    run: Path,
    saved: bool,
    machines: int = 1,
    processes: int = 1,
    device: torch.device = CPU,
) -> str:
    """One line on the size of the replay buffer, in memory and on disk.

    On disk the newest checkpoint and the best may have no frame in common, so that once the ring has wrapped there can
    be two buffers' worth.

    Args:
        data: the datamodule, before training.
        run: the run's folder.
        saved: whether checkpoints are written.
        machines: on how many the buffer's parts are; checkpoints are on a disk that they share.
        processes: how many there are in all, each with its part and, on GPUs, a device of its own.
        device: the one of this process.

    Raises:
        SettingError: when memory or disk is too small for it.
    """
    frame = frame_bytes(data.observation_dim, data.action_dim, data.timed)
    on_gpu = data.storage == "device" and device.type == "cuda"
    places = processes if on_gpu else machines
    filled = data.buffer_size if on_gpu else min(data.buffer_size, data.total_frames)  # a GPU has no lazy pages
    frames = math.ceil(filled / places)
    size, archive = frames * frame, min(2 * data.buffer_size, data.total_frames) * frame
    mapped, saved = data.storage == "memmap", saved and data.save_buffer
    here = f" on each {'device' if on_gpu else 'machine'}" if places > 1 else ""
    where = "mapped files" if mapped else str(device) if on_gpu else "memory"
    setting = f"data.buffer_size is {data.buffer_size}: {frames} frames of {data.env_name}{here} take"
    if not mapped:
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
        require(
            size <= free,
            f"{setting} {readable(size)} of {'the memory of ' if on_gpu else ''}{where}, and {readable(free)} is free; "
            f"lower it, or set data.storage to {'memory' if on_gpu else 'memmap'}",
        )
        row = 4 * max(data.observation_dim, data.action_dim)  # bytes a frame of the largest tensor, asked for at once
        whole, there = math.ceil(data.buffer_size / processes) * row, psutil.virtual_memory().total
        require(
            on_gpu or whole <= there,
            f"data.buffer_size is {data.buffer_size}: that needs a tensor of {readable(whole)}, and the memory of this "
            f"machine is {readable(there)}, however few frames the run has; lower it to data.total_frames "
            f"({data.total_frames}), or set data.storage to memmap",
        )
    needs: dict[int, int] = defaultdict(int)  # by disk, which folders may share
    disks: dict[int, Path] = {}
    if mapped:
        folder = runs.mapped_folder(run, data.storage_dir)
        _add(needs, disks, folder, size)
    if saved:
        _add(needs, disks, run / runs.CHECKPOINTS / checkpoints.REPLAY, archive)
    for disk, needed in needs.items():
        free = shutil.disk_usage(disks[disk]).free
        require(
            needed <= free,
            f"{setting} {readable(needed)} more of disk at {disks[disk]}, and {readable(free)} is free; lower it, "
            "free some, set data.save_buffer to false, or choose another trainer.default_root_dir or data.storage_dir",
        )
    on_disk = f", up to {readable(archive)} in {run / runs.CHECKPOINTS}" if saved else ""
    return f"replay buffer: {frames} frames{here}, {readable(size)} {'on' if on_gpu else 'in'} {where}{on_disk}"


def _add(needs: dict[int, int], disks: dict[int, Path], folder: Path, size: int) -> None:
    """Note what ``folder`` will need beyond what an earlier process of the run has put there."""
    existing = durable.nearest_existing(folder)
    device = existing.stat().st_dev
    there = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    needs[device] += max(0, size - there)
    disks.setdefault(device, existing)


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free, or less where a group of processes is limited."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """What the limits of this process's control groups, of either version, leave."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = root / own.lstrip("/")
        for folder in (group, *group.parents):
            if os.path.commonpath([folder, root]) == str(root):
                yield from _left(folder, f"memory.{limit}", f"memory.{used}")


def _left(folder: Path, limit: str, used: str) -> Iterator[int]:
    try:
        allowed, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if allowed != "max":
        yield int(allowed) - taken + int(stat.get("inactive_file", 0))


def readable(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"
