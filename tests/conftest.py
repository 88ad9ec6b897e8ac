"""The commands, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qsm_lightning import durable
from tests.helpers import environment
from tests.processes import Run

FullDisk = Callable[[Path], None]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: many tests wait, for processes that start, end or are late on purpose."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run one of the installed commands in an empty folder, as a process of its own."""

    def run(name: str, *args: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name(name), *map(str, args)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """Fill the disk below a folder: nothing can be written there any more."""

    def fill(folder: Path) -> None:
        write = durable.write_file

        def full(path: Path, content: bytes) -> None:
            if path.is_relative_to(folder):
                raise OSError(28, "No space left on device")
            write(path, content)

        monkeypatch.setattr("qsm_lightning.durable.write_file", full)

    return fill


@pytest.fixture
def quick_command(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """As ``command``, without the seconds that imports take; ``stdout`` and ``stderr`` are both all that it prints."""

    def run(name: str, *args: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        process = Run(tmp_path, *args, name=name, log=tmp_path_factory.mktemp("printed") / "log.txt")
        status = process.wait(timeout)
        return subprocess.CompletedProcess([name, *map(str, args)], status, process.text, process.text)

    return run
