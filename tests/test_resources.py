"""Too little memory or disk is said before the first frame."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from qsm_lightning import resources, runs
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError

Usage = namedtuple("Usage", "total used free")
FRAME = 4 * (2 * 3 + 1 + 1) + 2  # Pendulum


def data(**settings: Any) -> OffPolicyDataModule:
    return OffPolicyDataModule("Pendulum-v1", **({"total_frames": 1000, "init_random_frames": 300} | settings))


def test_the_size_is_that_of_the_frames_that_will_be_there(tmp_path: Path) -> None:
    assert resources.report(data(), tmp_path, saved=False) == "replay buffer: 1000 frames, 33.2 KiB in memory"
    line = resources.report(data(buffer_size=400), tmp_path, saved=True)
    assert line == f"replay buffer: 400 frames, 13.3 KiB in memory, up to 26.6 KiB in {tmp_path}/checkpoints"
    line = resources.report(data(storage="memmap", save_buffer=False), tmp_path, saved=True)
    assert line == "replay buffer: 1000 frames, 33.2 KiB in mapped files"
    line = resources.report(data(storage="device"), tmp_path, saved=False)
    assert line == "replay buffer: 1000 frames, 33.2 KiB in memory"


@pytest.mark.parametrize("free", [1000 * FRAME - 1, 1000 * FRAME])
def test_memory(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: free)
    if free < 1000 * FRAME:
        with pytest.raises(SettingError, match="data.buffer_size is 1000000: .* 33.2 KiB of memory.*memmap"):
            resources.report(data(), tmp_path, saved=False)
    else:
        resources.report(data(), tmp_path, saved=False)
    resources.report(data(storage="memmap"), tmp_path, saved=False)


def test_a_ring_that_the_machine_could_not_hold_is_refused(tmp_path: Path) -> None:
    """Its tensors are allocated whole, however few frames will be written to them."""
    with pytest.raises(SettingError, match=r"data.buffer_size is 10{12}: .*lower it to data.total_frames \(1000\)"):
        resources.report(data(buffer_size=10**12), tmp_path, saved=False)
    resources.report(data(buffer_size=10**12, storage="memmap", save_buffer=False), tmp_path, saved=False)


@pytest.mark.parametrize("free", [1000 * FRAME - 1, 1000 * FRAME])
def test_memory_of_a_gpu(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    device = torch.device("cuda:1")
    on_gpu = data(storage="device", buffer_size=1000, total_frames=400)  # all of it is taken at once
    if free < 1000 * FRAME:
        with pytest.raises(SettingError, match="33.2 KiB of the memory of cuda:1, .*set data.storage to memory"):
            resources.report(on_gpu, tmp_path, False, device=device)
    else:
        line = resources.report(on_gpu, tmp_path, False, device=device)
        assert line == "replay buffer: 1000 frames, 33.2 KiB on cuda:1"
        line = resources.report(data(storage="device", buffer_size=4000), tmp_path, False, 1, 4, device)
        assert line == "replay buffer: 1000 frames on each device, 33.2 KiB on cuda:1"
    with pytest.raises(SettingError, match="33.2 KiB of memory, .*set data.storage to memmap"):
        resources.report(data(), tmp_path, False, device=device)


@pytest.mark.parametrize(
    ("settings", "saved", "needed"),
    [
        ({}, True, 1000 * FRAME),
        ({"buffer_size": 400}, True, 800 * FRAME),
        ({}, False, 0),
        ({"save_buffer": False}, True, 0),
        ({"storage": "memmap"}, True, 2000 * FRAME),
        ({"storage": "memmap", "storage_dir": "elsewhere"}, True, 2000 * FRAME),
        ({"storage": "memmap"}, False, 1000 * FRAME),
    ],
    ids=str,
)
def test_disk(
    settings: dict[str, Any], saved: bool, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for folders that are still to be made; needs on the same disk are added up."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "not" / "yet"
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    resources.report(data(**settings), run, saved)
    if not needed:
        return
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    with pytest.raises(SettingError, match="KiB more of disk at .*data.save_buffer"):
        resources.report(data(**settings), run, saved)
    if saved:  # what a resumed run has on disk is not needed again
        (run / "checkpoints" / "replay").mkdir(parents=True)
        (run / "checkpoints" / "replay" / "0.pt").write_bytes(b"x")
        resources.report(data(**settings), run, saved)


def test_the_mapped_files_of_a_killed_process_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They will be removed before new ones are made."""
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    with pytest.raises(SettingError, match="of disk"):
        resources.report(data(storage="memmap"), tmp_path, saved=False)
    left = runs.mapped_folder(tmp_path, None)
    left.mkdir()
    (left / "observation.memmap").write_bytes(bytes(1000 * FRAME))
    resources.report(data(storage="memmap"), tmp_path, saved=False)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_group_of_processes_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM, systemd and containers set one for the process's own group or for one above it."""
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    monkeypatch.setattr(resources, "OWN_CGROUP", tmp_path / "own")
    assert resources.available_memory() > 2**20
    lines = ["0::/job/step", "9:cpu,memory:/job/step\n8:pids:/job/step"]
    (tmp_path / "own").write_text(lines[version == 1] + "\n")
    group = (tmp_path / "memory" if version == 1 else tmp_path) / "job"
    (group / "step").mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, content in zip(
        (*names, "memory.stat"), ("1000000", "700000", "anon 1\ninactive_file 50000"), strict=True
    ):
        (group / name).write_text(f"{content}\n")
    assert resources.available_memory() == 350_000
    (group / names[0]).write_text("max\n")
    if version == 2:
        assert resources.available_memory() > 2**20
