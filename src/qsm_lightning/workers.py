"""Collection by workers: TorchRL's collectors in processes of this machine, or anywhere by Ray.

The only file that knows Ray or TorchRL's collectors of several workers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from copy import deepcopy
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import EnvBase

from qsm_lightning.collect import in_order_of_time
from qsm_lightning.env_faults import Guarded, belong_to_parent
from qsm_lightning.env_state import NoStateError
from qsm_lightning.errors import EnvironmentFault, SettingError, TrainingFault, first_line, require
from qsm_lightning.watch import beat

Kind = Literal["processes", "ray"]

START_SECONDS = 300.0  # for workers to start: other machines may have to wake up
CLOSE_SECONDS = 10.0


class Workers:
    """An endless iterator over chunks of frames that workers collect together, with weights of a bounded age.

    Each chunk is made by all workers, an equal part by each, with the same weights; so the order of frames does not
    hang on who is quicker. Weights are sent as often as ``max_staleness`` asks for. When it is at least
    ``updates_per_chunk``, the workers collect the next chunk while the learner still updates with the last one;
    otherwise they take turns.

    Args:
        kind: ``processes`` on this machine, or ``ray``: the cluster that Ray finds (``RAY_ADDRESS``, or one started on
            this machine), else one of its own on this machine.
        make_env: makes the environments of one worker, batch size [] or [E].
        seeds: for each worker, the seeds of its environments and of its torch generator.
        policy: the learner's policy; workers act with copies of it on the CPU.
        frames_per_batch: frames in a chunk, a multiple of the workers' environments.
        init_random_frames: frames of uniform actions still to come, rounded up to whole chunks.
        max_staleness: gradient updates that may have been made since the weights that made a chunk, when it arrives.
        updates_per_chunk: most updates that the learner makes between two chunks.
        updates: the number of updates made so far.
        timeout: seconds after which a chunk that has not come counts as hanging.

    Attributes:
        staleness: updates made since the weights of the last chunk, when it arrived.

    Raises:
        EnvironmentFault: when an environment fails, a worker dies or hangs; also while iterating.
        TrainingFault: while iterating, when a weight or an action is NaN or infinite.
        SettingError: when Ray has fewer CPUs than there are workers.
    """

    def __init__(
        self,
        kind: Kind,
        make_env: Callable[[], EnvBase],
        seeds: Sequence[tuple[int, int]],
        policy: nn.Module,
        *,
        frames_per_batch: int,
        init_random_frames: int,
        max_staleness: int,
        updates_per_chunk: int,
        updates: Callable[[], int],
        timeout: float,
    ) -> None:
        self.staleness = 0
        self._policy, self._updates, self._timeout = policy, updates, timeout
        self._max_staleness = max_staleness
        self._ahead = max_staleness >= updates_per_chunk
        self._lag = updates_per_chunk if self._ahead else 0
        self._version: int | None = None
        self._reports = TemporaryDirectory(prefix="qsm-workers-")
        self._ending = contextlib.ExitStack()
        build = partial(
            _processes if kind == "processes" else _ray,
            self._ending,
            [
                partial(
                    _worker_env, make_env, *seed, Path(self._reports.name) / str(i) if kind == "processes" else None
                )
                for i, seed in enumerate(seeds)
            ],
            deepcopy(policy).cpu().requires_grad_(False),
            frames_per_batch=frames_per_batch,
            init_random_frames=math.ceil(init_random_frames / frames_per_batch) * frames_per_batch,
        )
        self._others = multiprocessing.active_children()
        self._thread = _Thread()
        self._pending: Future[Any] | None = self._thread.submit(build)
        self._started = False
        self._collector = self._result(START_SECONDS)
        self._started = True
        # Not iter(): at an error it would first wait for the other workers to end.
        self._chunks: Iterator[TensorDictBase] = self._collector.iterator()

    def __iter__(self) -> Workers:
        return self

    def __next__(self) -> TensorDictBase:
        """The next chunk [frames], in order of time."""
        if self._pending is None:
            self._request()
        chunk = self._result(self._timeout)
        self.staleness = self._updates() - (self._version or 0)
        if self._ahead:
            self._request()
        return in_order_of_time(chunk.flatten(0, 1) if chunk.ndim == 3 else chunk)

    def env_state(self) -> dict[str, Any]:
        """Not known here.

        Raises:
            NoStateError: always; the episodes under way begin anew.
        """
        raise NoStateError("it is with the workers of data.collector")

    def load_env_state(self, state: dict[str, Any]) -> None:
        """As :meth:`env_state`."""
        self.env_state()

    def _request(self) -> None:
        """Have the next chunk collected, with new weights if the old ones would be too old when it arrives."""
        weights = None
        if self._version is None or self._updates() - self._version + self._lag > self._max_staleness:
            weights = TensorDict.from_module(self._policy).data.cpu().clone().lock_()
            if not all(value.isfinite().all() for value in weights.values(True, True)):
                raise TrainingFault("training diverged: a weight of the policy is NaN or infinite")
            self._version = self._updates()
        self._pending = self._thread.submit(partial(self._collect, weights))

    def _collect(self, weights: TensorDictBase | None) -> TensorDictBase:
        if weights is not None:
            self._collector.update_policy_weights_(weights)
        return next(self._chunks)

    def _result(self, timeout: float) -> Any:
        assert self._pending is not None
        end = time.monotonic() + timeout
        while not wait([self._pending], 1.0).done and time.monotonic() < end:
            beat()  # their own limit counts, not that of ranks
        try:
            result = self._pending.result(0)
        except Exception as error:
            fault = self._fault(error, timeout)
            self.close(at_once=True)
            raise fault from error
        self._pending = None
        return result

    def _fault(self, error: Exception, timeout: float) -> Exception:
        """What went wrong in a worker, in one sentence."""
        error = getattr(error, "cause", error)  # Ray hands over an error within its own
        if isinstance(error, (TrainingFault, SettingError)):
            return error
        for report in sorted(Path(self._reports.name).iterdir()):
            return EnvironmentFault(report.read_text())
        assert self._pending is not None
        if not self._pending.done():
            limit = " (data.env_timeout)" if self._started else ""
            return EnvironmentFault(f"a worker of data.collector did not answer within {timeout:g} s{limit}")
        said = re.findall(r"^\s*[\w.]*(?:EnvironmentFault|SettingError): (.+)$", str(error), re.MULTILINE)
        if said:  # in the text of the error with which a worker of Ray could not start
            return EnvironmentFault(said[-1])
        reason = first_line(error)
        if "Cannot close a process" in reason:  # TorchRL could not end the others
            reason = "a process ended"
        what = "a worker of data.collector died" if self._started else "the workers of data.collector did not start"
        return EnvironmentFault(f"{what} ({reason})")

    def close(self, at_once: bool = False) -> None:
        """End all workers.

        Args:
            at_once: without waiting for what they are doing.
        """
        if self._pending is not None and not at_once:
            wait([self._pending], CLOSE_SECONDS)
        under_way = self._pending is not None and not self._pending.done()
        if under_way or at_once:
            for process in multiprocessing.active_children():
                if process not in self._others:
                    with contextlib.suppress(ValueError):  # closed before
                        process.kill()
        with contextlib.suppress(Exception):
            self._ending.close()
        self._thread.end()
        self._reports.cleanup()


class _Thread:
    """Does one thing after the other; the process does not wait for it when it ends, so a worker can hold up nobody.

    One thread as long as there are workers: Ray's processes end with the thread that started them.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="collect", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._work.put((work, future))
        return future

    def end(self) -> None:
        """Let it end after what it does now."""
        self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del work, future, item


class RayWorker(Collector):
    """A collector that is true: asked by Ray while it handles an error, an endless one fails, as it has no length."""

    def __bool__(self) -> bool:
        return True


def _worker_env(make_env: Callable[[], EnvBase], env_seed: int, noise_seed: int, report: Path | None) -> EnvBase:
    """Runs in the worker: its environments and its random streams.

    Args:
        make_env: makes the environments.
        env_seed: their seed.
        noise_seed: seed of torch's generator: random actions, the policy's noise.
        report: where a process leaves the fault of an environment; Ray hands over errors itself.
    """
    if report is not None:
        belong_to_parent()
        Guarded.report = report
    torch.manual_seed(noise_seed)
    env = make_env()
    env.set_seed(env_seed)
    return env


def _processes(
    ending: contextlib.ExitStack, envs: list[Callable[[], EnvBase]], policy: nn.Module, **settings: Any
) -> MultiSyncCollector:
    """TorchRL's collector in processes of this machine; ``ending`` ends it."""
    threads = torch.get_num_threads()  # the collector would take some from the learner
    ending.callback(torch.set_num_threads, threads)
    collector = MultiSyncCollector(
        envs,
        policy,
        total_frames=-1,
        num_threads=threads,
        trust_policy=True,
        auto_register_policy_transforms=False,
        **settings,
    )
    ending.callback(collector.shutdown, CLOSE_SECONDS, raise_on_error=False)
    return collector


def _ray(ending: contextlib.ExitStack, envs: list[Callable[[], EnvBase]], policy: nn.Module, **settings: Any) -> Any:
    """TorchRL's collector on the machines of a Ray cluster, one CPU for each worker; ``ending`` ends it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        ending.callback(ray.shutdown)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    require(
        cpus >= len(envs),
        f"data.collector_workers is {len(envs)}: Ray has {cpus} CPUs, and each worker takes one; lower it, or add "
        "machines to the cluster",
    )
    from torchrl.collectors.distributed import RayCollector

    class RayWorkers(RayCollector):
        """One that was left half made does not start another Ray when it goes."""

        def __del__(self) -> None:
            if ray.is_initialized():
                super().__del__()

    collector = RayWorkers(
        envs,
        policy,
        total_frames=sys.maxsize,
        sync=True,
        collector_class=RayWorker,
        collector_kwargs=[{"trust_policy": True, "auto_register_policy_transforms": False} for _ in envs],
        remote_configs={"num_cpus": 1, "num_gpus": 0},
        **settings,
    )
    ending.callback(collector.shutdown)
    return collector
