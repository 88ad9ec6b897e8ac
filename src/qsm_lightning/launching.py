"""How many processes a run has, who starts them, and which ways of starting them are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from qsm_lightning.env_faults import end_without
from qsm_lightning.errors import require

GRACE = 15.0  # seconds
SWEEP = "QSM_SWEEP"  # tells a process which qsm-sweep has started it
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")


@dataclass(frozen=True)
class World:
    """The processes that a launcher has started."""

    launcher: str
    nodes: int
    per_node: int


def launched() -> World | None:
    """What torchrun or SLURM has started, this process being one of it; nothing if this command starts its own."""
    if TorchElasticEnvironment.detect():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return World("torchrun", int(os.environ["WORLD_SIZE"]) // per_node, per_node)
    if SLURMEnvironment.detect():
        require(
            os.environ["SLURM_NTASKS"] == "1" or "SLURM_NTASKS_PER_NODE" in os.environ,
            "SLURM has started several tasks: give their number with --ntasks-per-node, not --ntasks",
        )
        return World("srun", int(os.environ.get("SLURM_NNODES", 1)), int(os.environ.get("SLURM_NTASKS_PER_NODE", 1)))
    return None


def trainer_settings(settings: Any) -> dict[str, Any]:
    """What the trainer is given in place of its settings' devices, num_nodes and strategy.

    Processes of torchrun or SLURM need not be counted again. Several processes train by ``ddp``: an update's two
    backward passes each use only a part of the module, which :func:`qsm_lightning.distributed.backward` sees to.

    Raises:
        SettingError: for a strategy that does not fit, and for numbers that contradict the launcher's.
    """
    world, given = launched(), {"devices": settings["devices"], "num_nodes": settings["num_nodes"]}
    changed: dict[str, Any] = {}
    if world is not None and world.nodes * world.per_node > 1:
        changed = {"devices": world.per_node, "num_nodes": world.nodes}
        wrong = [
            f"trainer.{name} is {given[name]}"
            for name, default in (("devices", "auto"), ("num_nodes", 1))
            if given[name] not in (default, changed[name], str(changed[name]))
        ]
        require(
            not wrong,
            f"{' and '.join(wrong)}: {world.launcher} has started {world.per_node} processes on each of {world.nodes} "
            "nodes; leave trainer.devices and trainer.num_nodes out",
        )
    strategy = settings["strategy"]
    kind = strategy if isinstance(strategy, str) else type(strategy).__name__
    method = getattr(strategy, "_start_method", "popen")
    require(
        strategy in STRATEGIES
        if isinstance(strategy, str)
        else isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)) and method == "popen",
        f"trainer.strategy is {kind if method == 'popen' else f'{kind} with start_method {method}'}: a run has one "
        "process per device, started by this command, torchrun or SLURM, each with a whole copy of the networks; use "
        "ddp, or leave it out",
    )
    several = _several(given | changed, settings["accelerator"])
    if strategy == "ddp" or (strategy == "auto" and several):
        # The schedule's buffers never change: there is nothing to broadcast before each step.
        changed["strategy"] = DDPStrategy(broadcast_buffers=False)
    return changed


def _several(given: dict[str, Any], accelerator: Any) -> bool:
    """Whether the settings ask for more than one process."""
    if given["num_nodes"] > 1:
        return True
    devices = given["devices"]
    if devices in ("auto", "-1", -1):
        return accelerator in ("auto", "gpu", "cuda") and torch.cuda.device_count() > 1
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    if isinstance(devices, list):
        return len(devices) > 1
    require(
        str(devices).isdecimal(),
        f"trainer.devices is {devices!r}: give a number, a list of GPUs such as [0, 1], or auto",
    )
    return int(devices) > 1


def gpus() -> list[str]:
    """The GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return named[:count] or [str(index) for index in range(count)]


def take_over_children(trainer: Trainer) -> list[subprocess.Popen[Any]]:
    """The processes that this one has started. From now on, Lightning does not look after them.

    When one of them ends, Lightning's observer kills all others without a word.
    """
    launcher = trainer.strategy.launcher
    children = list(getattr(launcher, "procs", []))
    if children:
        launcher.procs.clear()  # type: ignore[union-attr]
    return children


def end_with_parent() -> None:
    """In a process that ``qsm-fit`` has started for another device: end when that one is gone.

    Once they train together, :mod:`qsm_lightning.watch` sees it sooner, and says it. What ``qsm-sweep`` has started
    stops with a checkpoint when that is gone.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and launched() is None:
        threading.Thread(target=end_without, args=(os.getppid(), GRACE), daemon=True).start()
    elif SWEEP in os.environ:
        threading.Thread(target=_stop_without, args=(int(os.environ[SWEEP]),), daemon=True).start()


def _stop_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
