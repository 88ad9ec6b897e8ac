"""Environments that fail: whatever goes wrong inside one becomes an :class:`EnvironmentFault` that names it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from tensordict import TensorDictBase
from torchrl.envs import EnvBase, ParallelEnv

from qsm_lightning.errors import EnvironmentFault, one_line
from qsm_lightning.watch import beat

T = TypeVar("T")


class Guarded:
    """Mixin for a TorchRL environment: errors, NaN, inf and changed shapes end in an :class:`EnvironmentFault`."""

    source = ""  # the name under which it was made
    report: Path | None = None  # where a worker process leaves its fault before it ends

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._guard(super()._step, tensordict)  # type: ignore[misc]

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        return self._guard(super()._reset, tensordict, **kwargs)  # type: ignore[misc]

    def _guard(self, call: Callable[..., TensorDictBase], *args: Any, **kwargs: Any) -> TensorDictBase:
        beat()
        try:
            out = call(*args, **kwargs)
            self._check(out)
        except (Exception, SystemExit) as error:
            fault = self._fault(error)
            if self.report is None:
                raise fault from error
            self.report.write_text(str(fault))
            raise SystemExit(1) from error
        return out

    def _fault(self, error: BaseException) -> EnvironmentFault:
        said = str(error) if isinstance(error, EnvironmentFault) else f"{type(error).__name__}: {error}"
        return EnvironmentFault(f"the environment {self.source} failed ({one_line(said)})")

    def _check(self, out: TensorDictBase) -> None:
        for key, spec in self.full_observation_spec.items(True, True):  # type: ignore[attr-defined]
            value = out[key]
            if value.shape != spec.shape:
                raise EnvironmentFault(f"{key} has the shape {list(value.shape)} instead of {list(spec.shape)}")
            if not value.isfinite().all():
                raise EnvironmentFault(f"{key} is NaN or infinite")
        reward = out.get("reward", None)
        if reward is not None and not reward.isfinite().all():
            raise EnvironmentFault("reward is NaN or infinite")


class ProcessEnv(ParallelEnv):
    """Environments in processes of their own; one that raises, dies or hangs ends in an :class:`EnvironmentFault`.

    Args:
        makers: one factory per process.
        source: the environments' name.
        timeout: seconds after which a step or reset counts as hanging.
    """

    def __init__(self, makers: Sequence[Callable[[], EnvBase]], *, source: str, timeout: float) -> None:
        self._reports = TemporaryDirectory(prefix="qsm-env-")
        reports = [Path(self._reports.name) / str(i) for i in range(len(makers))]
        super().__init__(len(makers), [partial(_in_worker, m, r) for m, r in zip(makers, reports, strict=True)])
        self._source, self._step_timeout = source, timeout

    def _wait_for_workers(self, workers_range: Any) -> None:
        self.BATCHED_PIPE_TIMEOUT = self._step_timeout
        super()._wait_for_workers(workers_range)

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """Seeding resets the environments, which may fail as any reset."""
        return self._guard(self._seed_workers, seed, static_seed)

    def _seed_workers(self, seed: int | None, static_seed: bool) -> int | None:
        if self.is_closed:
            self.start()
        for channel in self.parent_channels:
            channel.send(("seed", (seed, static_seed)))
            if not channel.poll(self._step_timeout):
                raise RuntimeError("time limit")
            _, seed = channel.recv()
        return seed

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._guard(super()._step, tensordict)

    def _reset(self, tensordict: TensorDictBase, **kwargs: Any) -> TensorDictBase:
        return self._guard(super()._reset, tensordict, **kwargs)

    def _guard(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        beat()
        try:
            return call(*args, **kwargs)
        except (RuntimeError, OSError, EOFError) as error:
            what = self._what_happened(error)
            self._kill_workers()
            raise EnvironmentFault(what) from error

    _workers: list[Any]

    def _kill_workers(self) -> None:
        """End every process now: the sound ones only wait for orders, another may hang for ever."""
        for process in self._workers:
            with contextlib.suppress(ValueError):  # closed before
                process.kill()
        self._workers = []
        self._reports.cleanup()
        self.is_closed = True

    def close(self, **kwargs: Any) -> None:
        super().close(**kwargs)
        self._reports.cleanup()

    def _what_happened(self, error: Exception) -> str:
        for report in sorted(Path(self._reports.name).iterdir()):
            return report.read_text()
        if "time limit" in str(error):
            return f"the environment {self._source} did not answer within data.env_timeout ({self._step_timeout:g} s)"
        return f"a process of the environment {self._source} died ({one_line(error) or 'it hung up'})"


def belong_to_parent() -> None:
    """Runs in a worker: stopping is for the main process to arrange, and when that ends the worker ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_without, args=(os.getppid(),), daemon=True).start()


def end_without(parent: int, grace: float = 0.0) -> None:
    """For a thread: end this process ``grace`` seconds after the one that started it is gone, however it hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(grace)
    os._exit(1)


def _in_worker(make: Callable[[], EnvBase], report: Path) -> EnvBase:
    """Runs in the worker: faults go into a file."""
    belong_to_parent()
    env = make()
    env.report = report
    return env
