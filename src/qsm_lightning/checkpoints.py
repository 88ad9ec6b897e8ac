"""Checkpoints on disk: written whole or not at all, found, verified, thinned out. The format, and nothing of training.

A run's ``checkpoints`` folder::

    000005000/            a checkpoint, named by its frame (a second one at the same frame: 000005000-1)
      manifest.json       format, frames, evaluation return, versions, and size and SHA-256 of every file
      state.ckpt          Lightning's checkpoint: networks, optimizers, counters, generators, environments
    replay/               files of replay frames, shared by the checkpoints that list them

A checkpoint is made in a hidden folder, synced, and renamed: one that has its name is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qsm_lightning import durable
from qsm_lightning.durable import Record
from qsm_lightning.errors import SettingError, require

FORMAT = 1
STATE, MANIFEST, REPLAY = "state.ckpt", "manifest.json", "replay"
PACKAGES = (
    *("qsm-lightning", "torch", "pytorch-lightning", "torchrl", "tensordict", "numpy"),
    *("gymnasium", "mujoco", "dm_control", "envpool"),
)
_NAME = re.compile(r"(\d{9,})(?:-(\d+))?")
_REPLAY_NAME = re.compile(r"\.?\d+-\d{12,}-\d{12,}-[0-9a-f]+\.pt(\.\d+)?")  # with a dot: of a killed process


class DamagedError(Exception):
    """A checkpoint cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint's folder."""

    path: Path

    @property
    def state(self) -> Path:
        """Lightning's checkpoint file."""
        return self.path / STATE

    @property
    def replay(self) -> Path:
        """The folder of the files of replay frames."""
        return self.path.parent / REPLAY

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.parent.parent

    @property
    def order(self) -> tuple[int, int]:
        """Frame, and number among those of the same frame."""
        match = _NAME.fullmatch(self.path.name)
        return (int(match[1]), int(match[2] or 0)) if match else (0, 0)

    def manifest(self) -> dict[str, Any]:
        """What was written beside the state.

        Raises:
            DamagedError: when it is missing or not a manifest.
            SettingError: when a later version of this package wrote it.
        """
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            written = manifest["format"]
            assert isinstance(written, int)
            assert all({"bytes", "sha256"} <= r.keys() for r in (manifest["files"] | manifest["replay"]).values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise DamagedError(f"{path} is missing or not a manifest") from error
        require(
            written <= FORMAT,
            f"{self.path} has format {written}, and this version of qsm-lightning reads up to {FORMAT}: install the "
            f"version that wrote it ({manifest.get('versions', {}).get('qsm-lightning', 'unknown')}) or a later one",
        )
        return manifest

    def verify(self, replay: bool = True) -> None:
        """Compare every file with the manifest.

        Args:
            replay: also the files of replay frames, which evaluation does not need.

        Raises:
            DamagedError: for the first file that is missing, truncated or altered.
        """
        manifest = self.manifest()
        files = {self.path / name: entry for name, entry in manifest["files"].items()}
        if self.state not in files:
            raise DamagedError(f"{self.path / MANIFEST} does not list {STATE}")
        if replay:
            files |= {self.replay / Path(name).name: entry for name, entry in manifest["replay"].items()}
        for path, entry in files.items():
            _compare(path, entry)


def _compare(path: Path, entry: Record) -> None:
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DamagedError(f"{path} has {size} bytes of {entry['bytes']}")
    if durable.record_of_file(path) != entry:
        raise DamagedError(f"{path} was altered: its content is not what was written")


# Finding.


def complete(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a run's ``checkpoints`` folder, oldest first."""
    found = [Checkpoint(path) for path in folder.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.order)


def eval_return(checkpoint: Checkpoint) -> float | None:
    """The evaluation return a checkpoint was written with, if an evaluation came right before it."""
    try:
        found = checkpoint.manifest().get("eval_return")
    except (DamagedError, SettingError):
        return None
    return found if isinstance(found, (int, float)) else None


def best(folder: Path) -> Checkpoint | None:
    """The checkpoint with the highest evaluation return, the earliest of equals."""
    scored = [(score, c) for c in complete(folder) if (score := eval_return(c)) is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def newest_good(
    folder: Path, up_to: Checkpoint | None = None, replay: bool = True
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every file is as it was written, and what is wrong with the newer ones.

    Args:
        folder: a run's ``checkpoints`` folder.
        up_to: look at this one and older ones only.
        replay: also at the files of replay frames.
    """
    return first_whole([c for c in reversed(complete(folder)) if up_to is None or c.order <= up_to.order], replay)


def first_whole(candidates: Iterable[Checkpoint], replay: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The first of ``candidates`` whose every file is as it was written, and what is wrong with those before it.

    Args:
        candidates: in the order of preference.
        replay: look at the files of replay frames, too.
    """
    faults = []
    for checkpoint in candidates:
        try:
            checkpoint.verify(replay)
        except DamagedError as fault:
            faults.append(str(fault))
        else:
            return checkpoint, faults
    return None, faults


# Writing.


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder inside ``folder`` to write a checkpoint in; it is gone afterwards unless published."""
    stage = folder / ".staging"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(stage, ignore_errors=True)  # of a process that was killed
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, frames: int, eval_return: float | None, replay: dict[str, Record]) -> Checkpoint:
    """Sync what was staged, add the manifest, and give the checkpoint its name.

    Args:
        stage: the folder of :func:`staging`, with the state in it.
        frames: environment frames so far.
        eval_return: the return of the evaluation right before, if there was one.
        replay: the files of replay frames that belong to it.

    Raises:
        OSError: when the disk is full or cannot be written.
    """
    files = {}
    for path in stage.iterdir():
        durable.sync(path)
        files[path.name] = durable.record_of_file(path)
    manifest = {
        "format": FORMAT,
        "frames": frames,
        "eval_return": eval_return,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "files": files,
        "replay": replay,
    }
    durable.write_file(stage / MANIFEST, json.dumps(manifest, indent=2).encode())
    durable.sync(stage)
    folder = stage.parent
    number = 1 + max((n for f, n in (c.order for c in complete(folder)) if f == frames), default=-1)
    path = folder / (f"{frames:09}" + (f"-{number}" if number else ""))
    os.rename(stage, path)
    for parent in (folder, folder.parent, folder.parent.parent):  # a new run's folders are new as well
        durable.sync(parent)
    return Checkpoint(path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a checkpoint means."""
    out = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            out[package] = version(package)
    return out


def thin_out(folder: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints and the best, then the replay files that none lists."""
    pinned = best(folder)
    for checkpoint in complete(folder)[:-keep_last]:
        if checkpoint != pinned:
            hidden = folder / f".removing-{checkpoint.path.name}"
            os.rename(checkpoint.path, hidden)  # whole or absent in this direction too
            shutil.rmtree(hidden, ignore_errors=True)
    for path in folder.glob(".removing-*"):
        shutil.rmtree(path, ignore_errors=True)
    listed: set[str] = set()
    for path in folder.glob(f"*/{MANIFEST}"):
        try:
            listed |= Checkpoint(path.parent).manifest()["replay"].keys()
        except DamagedError:
            continue  # nothing can go on from it
        except SettingError:
            return  # of a later version: what it lists may not be known
    for path in (folder / REPLAY).glob("*"):
        if _REPLAY_NAME.fullmatch(path.name) and path.name not in listed:
            path.unlink(missing_ok=True)


def set_aside_after(checkpoint: Checkpoint) -> list[Path]:
    """Rename the checkpoints newer than the one a run goes on from, so that they are kept and not taken for its own."""
    aside = []
    for newer in reversed(complete(checkpoint.path.parent)):
        if newer.order > checkpoint.order:
            target = next(
                path
                for n in range(10_000)
                if not (path := newer.path.with_name(f"{newer.path.name}.aside{n or ''}")).exists()
            )
            os.rename(newer.path, target)
            aside.append(target)
    return aside


# Reading.


def load(path: Path) -> dict[str, Any]:
    """The content of a state file, loaded with ``weights_only=True``: opening one runs no code.

    Raises:
        SettingError: when it is not a checkpoint of this package.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise SettingError(
            f"{path} is not a checkpoint, or a damaged one ({type(error).__name__}); choose another"
        ) from error
    keys = {"state_dict", "hyper_parameters", "datamodule_hyper_parameters", "OffPolicyDataModule"}
    require(
        isinstance(checkpoint, dict) and keys <= checkpoint.keys(),
        f"{path} is not a checkpoint of qsm-fit; choose one from a run's checkpoints folder",
    )
    return checkpoint
