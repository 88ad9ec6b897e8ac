"""The command line in processes that start quickly: forked from a server that has imported the package.

Each is a process of its own, with its own generators, environments and signal handlers, begun at the command's entry
point; tests that send signals or kill use them. ``conftest.command`` starts the installed script instead.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers import has

# Whether there is a GPU is asked without beginning to use it, after which a fork could not.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["qsm_lightning.cli", "tests.processes", *(["dm_control.suite"] if has("dm_control") else [])]
)


def _main(name: str, args: list[str], folder: Path, log: Path, rank: int, env: dict[str, str]) -> None:
    os.environ.update(env)
    os.chdir(folder)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = [name, *args]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_ADDRESS": "local"}  # for its workers
    import torch
    from pytorch_lightning.utilities import rank_zero_only

    from qsm_lightning.cli import fit
    from qsm_lightning.commands import evaluate, export, sweep

    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # which a new process knows from the first import on
    torch.set_num_threads(1)
    commands = {"qsm-eval": evaluate.main, "qsm-export": export.main, "qsm-fit": fit, "qsm-sweep": sweep.main}
    commands[name]()


class Run:
    """A running ``qsm-fit`` in ``folder``; what it prints is in :attr:`text`."""

    def __init__(
        self,
        folder: Path,
        *args: object,
        name: str = "qsm-fit",
        rank: int = 0,
        env: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.log = log or folder / f"log-{time.monotonic_ns()}.txt"
        self.log.touch()
        words = [str(arg) for arg in args]
        self.process = CONTEXT.Process(target=_main, args=(name, words, folder, self.log, rank, env or {}))
        self.process.start()

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = 300) -> int:
        """The exit status, as a shell gives it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.text}")
        code = self.process.exitcode
        assert code is not None
        return code if code >= 0 else 128 - code

    def until(self, condition: Callable[[], bool], timeout: float = 180, pause: float = 0.01) -> None:
        """Wait for something to be so while it runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), f"ended before:\n{self.text}"
            assert time.monotonic() < end, f"not within {timeout} s:\n{self.text}"
            time.sleep(pause)

    def signal(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class RankedRun:
    """A running ``qsm-fit`` of several processes, as torchrun or srun starts them; gone after :meth:`wait`."""

    def __init__(self, folder: Path, count: int, *args: object, by: str = "torchrun", **env: str) -> None:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
        number, local = "SLURM_PROCID", "SLURM_LOCALID"
        if by == "torchrun":
            number, local = "RANK", "LOCAL_RANK"
            world |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        self.ranks = [
            Run(
                folder, "--trainer.accelerator=cpu", *args, rank=rank, env=world | {number: str(rank), local: str(rank)}
            )
            for rank in range(count)
        ]

    @property
    def text(self) -> str:
        return "".join(rank.text for rank in self.ranks)

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit status of each."""
        end = time.monotonic() + timeout
        try:
            return [rank.wait(max(0.1, end - time.monotonic())) for rank in self.ranks]
        except AssertionError as error:
            raise AssertionError(self.text) from error
        finally:
            for rank in self.ranks:
                rank.process.kill()


def fit_ranks(folder: Path, count: int, *args: object, status: int = 0, timeout: float = 120) -> str:
    """Run ``qsm-fit`` with several processes to its end; returns what they printed."""
    run = RankedRun(folder, count, *args)
    assert run.wait(timeout) == [status] * count, run.text
    return run.text


def trained(folder: Path, *args: object) -> Path:
    """Run ``qsm-fit`` to its end; returns the run's folder."""
    fit(folder, *args)
    return next(folder.glob("runs/*/version_0"))


def fit(folder: Path, *args: object, status: int = 0) -> str:
    """Run ``qsm-fit`` to its end; returns what it printed."""
    run = Run(folder, *args)
    assert run.wait() == status, run.text
    return run.text
