"""Too little memory or disk is said before the first frame."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from qsm_lightning import resources
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError

Usage = namedtuple("Usage", "total used free")
FRAME = 4 * (2 * 3 + 1 + 1) + 2  # Pendulum


def data(**settings: Any) -> OffPolicyDataModule:
    return OffPolicyDataModule("Pendulum-v1", **({"total_frames": 1000, "init_random_frames": 300} | settings))


def test_the_size_is_that_of_the_frames_that_will_be_there(tmp_path: Path) -> None:
    assert resources.report(data(), tmp_path, saved=False) == "replay buffer: 1000 frames, 33.2 KiB in memory"
    line = resources.report(data(buffer_size=500), tmp_path, saved=True)
    assert line == f"replay buffer: 500 frames, 16.6 KiB in memory, as much again in {tmp_path}/checkpoints"
    line = resources.report(data(storage="memmap", save_buffer=False), tmp_path, saved=True)
    assert line == "replay buffer: 1000 frames, 33.2 KiB in mapped files"


@pytest.mark.parametrize("free", [1000 * FRAME - 1, 1000 * FRAME])
def test_memory(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: free)
    if free < 1000 * FRAME:
        with pytest.raises(SettingError, match="data.buffer_size is 1000000: .* 33.2 KiB of memory.*memmap"):
            resources.report(data(), tmp_path, saved=False)
    else:
        resources.report(data(), tmp_path, saved=False)
    resources.report(data(storage="memmap"), tmp_path, saved=False)


@pytest.mark.parametrize(
    ("settings", "saved", "needed"),
    [
        ({}, True, 1000 * FRAME),
        ({}, False, 0),
        ({"save_buffer": False}, True, 0),
        ({"storage": "memmap"}, True, 2000 * FRAME),
        ({"storage": "memmap"}, False, 1000 * FRAME),
    ],
)
def test_disk(
    settings: dict[str, Any], saved: bool, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a folder that is still to be made; what a resumed run has on disk already is not needed again."""
    run = tmp_path / "not" / "yet"
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    resources.report(data(**settings), run, saved)
    if not needed:
        return
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    with pytest.raises(SettingError, match="KiB of disk at .*yet.*data.save_buffer"):
        resources.report(data(**settings), run, saved)
    if saved:
        (run / "checkpoints" / "replay").mkdir(parents=True)
        (run / "checkpoints" / "replay" / "0.pt").write_bytes(b"x")
        resources.report(data(**settings), run, saved)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    whole = resources.available_memory()
    assert whole > 2**20
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert resources.available_memory() == 350_000
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.available_memory() > 2**20
