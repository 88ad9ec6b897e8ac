"""What all commands share: how they end, and how they read their options."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from pytorch_lightning.utilities import rank_zero_only

from qsm_lightning import durable, runs
from qsm_lightning.errors import EnvironmentFault, Interrupted, SettingError, TrainingFault, tell

# Of paths that were given: in another user's folder, or longer than names may be.
UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
FULL = (errno.ENOSPC, errno.EDQUOT)  # of disks


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors as a :class:`SettingError`."""

    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message}; see {self.prog} --help")


def run_command(prog: str, command: Callable[[], None]) -> None:
    """Run a command's body and turn the ways it can end early into one sentence and an exit status."""
    _quiet()
    logging.basicConfig(format=f"{_speaker(prog)}: %(message)s")
    try:
        try:
            command()
        except SystemExit:  # after --help and --print_config
            _flush()
            raise
        _flush()
    except BrokenPipeError as stop:
        if not _drop_unread_output():
            raise
        _stop(prog, stop, "what it prints is no longer read", 128 + signal.SIGPIPE)
    except SettingError as error:
        _stop(prog, error, str(error), 2)
    except OSError as error:
        if error.errno in FULL:
            _stop(prog, error, f"what it writes finds no place ({error.strerror}): free some disk", 3)
        if error.errno not in UNREACHABLE or error.filename is None:
            raise
        _stop(prog, error, f"{str(error.filename)!r} cannot be looked at ({error.strerror}): choose another", 2)
    except (TrainingFault, Interrupted) as stop:
        _stop(prog, stop, f"{stop}{_what_is_left(stop) if prog == 'qsm-fit' else ''}", _status(stop))
    except KeyboardInterrupt as stop:
        _stop(prog, stop, "interrupted; nothing was saved since the last checkpoint", 130)


def _status(stop: TrainingFault | Interrupted) -> int:
    return 128 + stop.signum if isinstance(stop, Interrupted) else 3


def _what_is_left(stop: TrainingFault | Interrupted) -> str:
    """Where the state of a run of ``qsm-fit`` is, behind what ended it."""
    if isinstance(stop, (EnvironmentFault, Interrupted)):
        return runs.and_now(stop.checkpoint)
    return f"; the last good checkpoint is {stop.checkpoint}" if stop.checkpoint else "; there is no checkpoint yet"


def check_results(folder: Path, *names: str) -> None:
    """Raise :class:`SettingError` unless :func:`write_results` can write these files into a folder."""
    for name in names:
        durable.check_writable(folder / name, "--out")


def write_results(folder: Path, table: str, files: dict[str, bytes]) -> None:
    """Write what a command found into a folder, each file whole, and print its table and where they are."""
    with durable.writing(folder, "--out"):
        durable.write_files(folder, files)
    print(f"{table}\n{', '.join(str(folder / name) for name in files)}")


def _stop(prog: str, error: BaseException, message: str, status: int) -> NoReturn:
    """End with a sentence; what all ranks end with is said by the first."""
    ignore_ctrl_c()
    if rank_zero_only.rank == 0 or not getattr(error, "agreed", False):  # type: ignore[attr-defined]
        tell(f"{_speaker(prog)}: {message}", sys.stderr)
    _drop_unwritable_output()
    sys.exit(status)


def _streams() -> list[TextIO]:
    """Standard output and error, but for what a shell has closed."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_unwritable_output() -> None:
    """Send to /dev/null the streams that a full disk does not let be flushed."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream.fileno())


def _to_nowhere(number: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _drop_unread_output() -> bool:
    """Send to /dev/null the streams into pipes that nobody reads any more; whether there are any."""
    unread = []
    for stream in _streams():
        ends = select.poll()
        ends.register(stream.fileno(), 0)
        if any(event & select.POLLERR for _, event in ends.poll(0)):
            unread.append(stream.fileno())
    for number in unread:
        _to_nowhere(number)
    return bool(unread)


def _speaker(prog: str) -> str:
    """Who says something: the command, and which rank of several if it is not the first."""
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    return f"{prog}: rank {rank}" if rank else prog


def ignore_ctrl_c() -> None:
    """The process ends now, with its status, however often Ctrl-C is pressed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _quiet() -> None:
    """Leave out what Lightning and TorchRL say about things this package decided on purpose."""
    for name in (
        "pytorch_lightning.utilities.rank_zero",
        "lightning_fabric.utilities.distributed",
        "lightning_fabric.utilities.seed",
        "torchrl",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*directory .* exists and is not empty.*",
        ".*LeafSpec.*",
        ".*precision lowered by casting.*",
        ".*`broadcast_buffers` is deprecated.*",
        ".*sync_dist=True.*",
        ".*args parameter is intended to run from within Python.*",
    ):
        warnings.filterwarnings("ignore", message=text)
