"""Files that are whole or absent, whatever moment the process or the machine stops at."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from qsm_lightning.errors import SettingError, require


class Record(TypedDict):
    """What a manifest says of a file: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


def record_of(content: bytes) -> Record:
    """The size and hash of ``content``."""
    return Record(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def check_writable(path: Path, setting: str) -> None:
    """Raise a :class:`SettingError` that names ``setting`` unless ``path`` can become a file here."""
    check_folder(path.resolve().parent, setting, path)
    with writing(path, setting):  # its name may be too long
        is_folder = path.is_dir()
    require(not is_folder, f"{setting} is {str(path)!r}: that is a folder; choose another name")


def check_folder(folder: Path, setting: str, given: Path | None = None) -> None:
    """Raise a :class:`SettingError` unless ``folder`` exists, or can be made, and can be written; makes nothing.

    Args:
        folder: the folder.
        setting: what names it.
        given: what that setting is; ``folder`` by default.
    """
    told = f"{setting} is {str(given or folder)!r}"
    with writing(given or folder, setting):  # a name may be too long to be looked for
        existing = nearest_existing(folder)
        longest = os.pathconf(existing, "PC_NAME_MAX")
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    require(writable, f"{told}: {existing} cannot be written; choose another folder")
    names = (len(os.fsencode(part)) for part in folder.parts)
    require(max(names, default=0) <= longest, f"{told}: a name in it is too long; choose a shorter one")


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


@contextlib.contextmanager
def writing(path: Path, setting: str) -> Iterator[None]:
    """Raise a :class:`SettingError` that names ``setting`` when ``path`` cannot be written, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise SettingError(f"{setting} is {str(path)!r}, which cannot be written ({error}): choose another") from error


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: beside it first, synced to disk, then renamed over what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, which is made if it is not there: each is whole, in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def record_of_file(path: Path) -> Record:
    """The size and hash of the file that is there."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return Record(bytes=path.stat().st_size, sha256=digest.hexdigest())


def packed(content: Any) -> bytes:
    """``torch.save`` into memory."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def unpacked(content: bytes) -> Any:
    """The inverse of :func:`packed`, with ``weights_only=True``."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
