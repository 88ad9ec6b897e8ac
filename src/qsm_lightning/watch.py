"""One rank that is killed, fails or hangs ends the whole run, and the reason is said."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from qsm_lightning.distributed import Ranks
from qsm_lightning.errors import one_line

PERIOD = 0.5  # seconds between two looks
SILENT = 25.0  # seconds without an answer after which a rank counts as lost
ENDING = 20.0  # seconds that ranks wait for each other at the end

_beats = 0


def beat() -> None:
    """Say that this process's main thread gets on: a step of an environment or an update is done."""
    global _beats
    _beats += 1


@dataclass
class Sign:
    """What a rank lets the others know twice a second."""

    beats: int = 0
    state: str = "runs"  # or done, or how it failed
    place: str = ""  # where its main thread is; empty while it waits for other ranks


class Watch:
    """A thread on every rank that exchanges signs of life with the others', and ends this process when one is lost.

    A rank is lost when its process is gone, when it said that it failed, or when it does not answer. All are lost when
    for ``timeout`` seconds none of them gets on: one hangs, and the others wait for it. That is so from the first step
    of an environment, or the first replay frames that are loaded; before, connecting has a time limit of its own.

    Args:
        ranks: the processes; all of them make their watch at the same time.
        timeout: seconds without progress on any rank after which the run ends.
        children: processes that this one has launched.
        closing_words: what to print behind the reason.
    """

    def __init__(
        self, ranks: Ranks, timeout: float, children: list[subprocess.Popen[Any]], closing_words: Callable[[], str]
    ) -> None:
        self.ranks, self.timeout, self.children, self.closing_words = ranks, timeout, children, closing_words
        self._processes = ranks.gather((socket.gethostname(), os.getpid()))
        self._signs = Ranks(ranks.rank, ranks.count, timeout=SILENT)
        self._state = "runs"
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    # The main thread's part.

    def done(self) -> None:
        """Training is over here: wait for the other ranks, and for the processes that this one has launched."""
        self._end("done")
        end = time.monotonic() + ENDING
        for child in self.children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()

    def failed(self, error: BaseException) -> None:
        """This rank fails with ``error``, unless that is because another one is lost, which then ends this process."""
        if isinstance(error, RuntimeError):  # how a broken connection shows
            self._thread.join(4 * PERIOD)
        self._end(f"failed: {type(error).__name__}: {one_line(error)}")

    def _end(self, state: str) -> None:
        self._state = state
        self._thread.join()

    # The thread's part.

    def _run(self) -> None:
        progress, beats = time.monotonic(), None
        while True:
            time.sleep(PERIOD)
            mine = Sign(_beats, self._state, _place(self._main))
            try:
                signs = [Sign(**sign) for sign in self._signs.gather(asdict(mine))]
            except Exception:  # a connection is broken, or nothing came
                lost = self._lost()
                self._stop([f"rank {r} {why}" for r, why in lost.items()] or ["a rank does not answer"], list(lost))
                return
            failed = [rank for rank, sign in enumerate(signs) if sign.state not in ("runs", "done")]
            if mine.state not in ("runs", "done") or all(sign.state == "done" for sign in signs):
                return
            if failed:
                self._stop([f"rank {rank} {signs[rank].state}" for rank in failed], failed)
                return
            now = time.monotonic()
            if beats != (beats := [sign.beats for sign in signs]):
                progress = now
            elif sum(beats) and now - progress > self.timeout:
                hang = [rank for rank, sign in enumerate(signs) if sign.place and sign.state == "runs"]
                where = [f"rank {rank} hangs in {signs[rank].place}" for rank in hang]
                self._stop([f"no rank got on for {self.timeout:g} s", *where], hang)
                return

    def _lost(self) -> dict[int, str]:
        """The ranks that cannot answer, and why. A process's connections break a moment before it is seen to end."""
        end, lost = time.monotonic() + 2 * PERIOD, dict[int, str]()
        while True:
            found = {rank: why for rank in range(self.ranks.count) if (why := self._gone(rank))}
            if (found and found == lost) or time.monotonic() > end:
                return found
            lost = found  # looked at once more: several may be killed together
            time.sleep(PERIOD / 5)

    def _gone(self, rank: int) -> str:
        """Why a rank on this machine cannot answer, if it cannot."""
        host, pid = self._processes[rank]
        if host != socket.gethostname() or rank == self.ranks.rank:
            return ""
        status = _status(pid)
        if status is None:
            return f"ended without a word: its process {pid} was killed or crashed"
        return f"does not answer: its process {pid} is stopped" if status == psutil.STATUS_STOPPED else ""

    def _stop(self, reasons: list[str], at_fault: list[int]) -> None:
        """End this process, and what is left of the others on this machine. The first sound rank says why."""
        sound = [rank for rank in range(self.ranks.count) if rank not in at_fault]
        try:
            if self.ranks.rank != (sound or [0])[0]:
                time.sleep(6 * PERIOD)  # for it to look at the others: this one is not at fault
                return
            with contextlib.suppress(Exception):  # nobody may be listening
                print(f"qsm-fit: {'; '.join(reasons)}{self.closing_words()}", file=sys.stderr, flush=True)
            others = {pid for host, pid in self._processes if host == socket.gethostname() and pid != os.getpid()}
            end = time.monotonic() + 12 * PERIOD  # for the others to see the same, and to say what befell them
            while any(map(_status, others)) and time.monotonic() < end:
                time.sleep(PERIOD / 5)
            for pid in filter(_status, others):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        finally:
            os._exit(3)


def _status(pid: int) -> str | None:
    """What the system says of a process; nothing when it is gone."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return None
    return None if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else status


def _place(thread: int | None) -> str:
    """Where a thread is, as far as it is code of the user's or this package's; empty if it waits for other ranks."""
    frame = sys._current_frames().get(thread or 0)
    place = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if f"torch{os.sep}distributed" in path:
            return ""
        if not place and not path.startswith((sys.prefix, "<")):
            place = f"{frame.f_code.co_name} ({path}, line {frame.f_lineno})"
        frame = frame.f_back
    return place or "a library"
