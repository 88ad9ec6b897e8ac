"""One rank that is killed, fails or hangs ends the whole run, and the reason is said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import TCPStore

from qsm_lightning.distributed import Ranks

PERIOD = 0.5  # seconds between two looks
SILENT = 25.0  # seconds without a sign of life after which a rank counts as lost
ENDING = 20.0  # seconds that ranks wait for each other at the end

_beats = 0


def beat() -> None:
    """Say that this process's main thread gets on: a step of an environment or an update is done."""
    global _beats
    _beats += 1


@dataclass
class Sign:
    """What a rank lets the others know twice a second."""

    number: int = 0
    beats: int = 0
    state: str = "runs"  # or done, failed
    place: str = ""  # where its main thread is; empty while it waits for other ranks


class Watch:
    """A thread on every rank that reads the others' signs of life, and ends this process when one is lost.

    A rank is lost when its process is gone, when it said that it failed, or when it is silent. All are lost when for
    ``timeout`` seconds none of them gets on: one hangs, and the others wait for it.

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
        host = os.environ.get("MASTER_ADDR", "localhost")
        patience = timedelta(seconds=SILENT)
        if ranks.rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        port = ranks.gather(self._store.port if ranks.rank == 0 else 0)[0]
        if ranks.rank > 0:
            self._store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._processes = ranks.gather((socket.gethostname(), os.getpid()))
        self._sign = Sign()
        self._signs = [Sign() for _ in range(ranks.count)]
        self._main = threading.main_thread().ident
        self._leave = threading.Event()
        self._publish()
        ranks.gather(None)  # every rank's sign is there
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    # The main thread's part.

    def done(self) -> None:
        """Training is over here: wait for the other ranks, which need this one until they are done too."""
        self._end("done")
        if self.ranks.rank > 0:
            return
        end = time.monotonic() + ENDING
        with contextlib.suppress(RuntimeError):
            while any(sign.state == "runs" for sign in self._read()) and time.monotonic() < end:
                time.sleep(PERIOD / 5)
        for child in self.children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()

    def failed(self, error: BaseException) -> None:
        """This rank fails with ``error``, unless that is because another one is lost, which then ends this process."""
        if isinstance(error, RuntimeError):  # how a broken connection shows
            time.sleep(4 * PERIOD)
        self._end("failed: " + " ".join(f"{type(error).__name__}: {error}".split()))
        if self.ranks.rank == 0:
            time.sleep(4 * PERIOD)  # for the others to read it: the signs are kept in this process

    def _end(self, state: str) -> None:
        self._sign.state = state
        self._leave.set()
        self._thread.join()

    # The thread's part.

    def _run(self) -> None:
        changed = [time.monotonic()] * self.ranks.count
        progress, looked = time.monotonic(), time.monotonic()
        started = False
        while True:
            left = self._leave.wait(PERIOD)
            try:
                self._publish()
                if left:
                    return
                signs = self._read()
            except RuntimeError:
                self._stop(["rank 0 is gone: it does not answer"], [0])
                return
            now = time.monotonic()
            if now - looked > SILENT / 2:  # this process was stopped itself, and knows nothing of the others
                changed, progress = [now] * self.ranks.count, now
            looked = now
            for rank, (before, sign) in enumerate(zip(self._signs, signs, strict=True)):
                if before.number != sign.number:
                    changed[rank] = now
            if any(before.beats != sign.beats for before, sign in zip(self._signs, signs, strict=True)):
                progress, started = now, True
            self._signs = signs
            lost = {r: why for r in range(self.ranks.count) if (why := self._lost(r, now - changed[r]))}
            if lost:
                self._stop([f"rank {rank} {why}" for rank, why in lost.items()], list(lost))
            elif started and now - progress > self.timeout:
                at_fault = [r for r, sign in enumerate(signs) if sign.place and sign.state == "runs"]
                where = [f"rank {r} hangs in {signs[r].place}" for r in at_fault] or ["the ranks wait for each other"]
                self._stop([f"no rank got on for {self.timeout:g} s", *where], at_fault)

    def _publish(self) -> None:
        place = _place(self._main)
        self._sign = Sign(self._sign.number + 1, _beats, self._sign.state, place)
        self._store.set(str(self.ranks.rank), json.dumps(asdict(self._sign)))

    def _read(self) -> list[Sign]:
        return [Sign(**json.loads(self._store.get(str(rank)))) for rank in range(self.ranks.count)]

    def _lost(self, rank: int, silent: float) -> str:
        """Why a rank counts as lost, if it does."""
        sign = self._signs[rank]
        host, pid = self._processes[rank]
        if rank == self.ranks.rank or sign.state == "done":
            return ""
        if sign.state != "runs":
            return sign.state
        if host == socket.gethostname() and not _alive(pid):
            return f"ended without a word: its process {pid} was killed or crashed"
        if silent > SILENT:
            return f"(process {pid} on {host}) was silent for {silent:.0f} s: it is stopped, or its machine is gone"
        return ""

    def _stop(self, reasons: list[str], at_fault: list[int]) -> None:
        """End this process, and those at fault on this machine. The first sound rank says why."""
        sound = [rank for rank in range(self.ranks.count) if rank not in at_fault]
        if self.ranks.rank == (sound or [0])[0]:
            print(f"qsm-fit: {'; '.join(reasons)}{self.closing_words()}", file=sys.stderr, flush=True)
            mine = {pid for host, pid in self._processes if host == socket.gethostname() and pid != os.getpid()}
            end = time.monotonic() + 10 * PERIOD  # for the others to see the same, and to say what befell them
            while any(map(_alive, mine)) and time.monotonic() < end:
                time.sleep(PERIOD / 5)
            for pid in filter(_alive, mine):
                os.kill(pid, signal.SIGKILL)
        time.sleep(2 * PERIOD)
        os._exit(3)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


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
