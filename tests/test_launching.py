"""Every way of starting several processes, with the real commands, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from pytorch_lightning.strategies import DDPStrategy

from qsm_lightning import checkpoints, launching
from qsm_lightning.errors import SettingError
from tests.compare import curves, last, state
from tests.helpers import SHRINK, environment
from tests.processes import RankedRun, fit_ranks, free_port

TINY = [
    *("--config=pendulum", *SHRINK, "--data.total_frames=96", "--data.eval_every_frames=96"),
    *("--data.eval_selector=sample", "--picture.every_evaluations=0", "--trainer.accelerator=cpu"),
]
LONG = [*TINY, "--data.total_frames=1000000", "--data.eval_every_frames=1000000", "--checkpoint.every_frames=16"]
BIN = Path(sys.executable).parent
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
SLURM = {"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "3", "SLURM_JOB_NAME": "train"}


@contextmanager
def started(folder: Path, *command: object) -> Iterator[subprocess.Popen[str]]:
    """A command as a process, whose output is in ``folder/log``; it and what it started are gone afterwards."""
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [*map(str, command)], cwd=folder, env=environment(), stdout=log, stderr=log, text=True
        )
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()


def until(condition: Any, folder: Path, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.1)


def other_rank(launcher: subprocess.Popen[str]) -> psutil.Process:
    """The process that ``qsm-fit`` started for the second device."""
    (child,) = (c for c in psutil.Process(launcher.pid).children() if any("qsm-fit" in word for word in c.cmdline()))
    return child


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def saved(folder: Path) -> list[checkpoints.Checkpoint]:
    return [c for path in folder.glob("runs/*/*/checkpoints") for c in checkpoints.complete(path)]


def assert_trained(folder: Path, count: int) -> None:
    """One run of ``count`` ranks went to its end in one folder."""
    (run,) = folder.glob("runs/*/*")
    assert len(state(run)["OffPolicyDataModule"]["ranks"]) == count
    assert [step for step, _ in curves(run)["eval/return"]] == [96]


def test_devices_and_sigterm_to_the_launcher(tmp_path: Path) -> None:
    """``--trainer.devices 2``: one signal, one checkpoint of both ranks, status 143, nothing left behind."""
    with started(tmp_path, BIN / "qsm-fit", *LONG, "--trainer.devices=2") as process:
        until(lambda: saved(tmp_path), tmp_path)
        child = other_rank(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, (tmp_path / "log").read_text()
    assert gone(child)
    text = (tmp_path / "log").read_text()
    assert text.count("interrupted by SIGTERM; the run's last state is in") == 1, text
    assert "Traceback" not in text
    ranks = state(next(tmp_path.glob("runs/*/*")))["OffPolicyDataModule"]["ranks"]
    assert ranks[0]["progress"] == ranks[1]["progress"]


@pytest.mark.parametrize("lost", ["launcher", pytest.param("child", marks=pytest.mark.slow)])
def test_a_killed_process_of_the_launcher_takes_the_others_with_it(lost: str, tmp_path: Path) -> None:
    with started(tmp_path, BIN / "qsm-fit", *LONG, "--trainer.devices=2") as process:
        until(lambda: saved(tmp_path), tmp_path)
        child = other_rank(process)
        began = time.monotonic()
        (process if lost == "launcher" else child).send_signal(signal.SIGKILL)
        assert process.wait(60) == (-9 if lost == "launcher" else 3)
        until(lambda: gone(child), tmp_path, 60)
        assert time.monotonic() - began < 60
    text = (tmp_path / "log").read_text()
    assert f"rank {0 if lost == 'launcher' else 1} ended without a word" in text, text
    last(next(tmp_path.glob("runs/*/*")))


def test_torchrun(tmp_path: Path) -> None:
    """Nothing about devices is said twice."""
    with started(tmp_path, BIN / "torchrun", "--nproc_per_node=2", BIN / "qsm-fit", *TINY) as process:
        assert process.wait(180) == 0, (tmp_path / "log").read_text()
    assert_trained(tmp_path, 2)


@pytest.mark.slow
def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """Two "nodes" of one process each meet on this machine."""
    rendezvous = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    nodes = [
        [BIN / "torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=1", rendezvous]
        for _ in range(2)
    ]
    with (
        started(tmp_path, *nodes[0], BIN / "qsm-fit", *TINY) as one,
        started(tmp_path, *nodes[1], BIN / "qsm-fit", *TINY) as two,
    ):
        assert [one.wait(180), two.wait(180)] == [0, 0], (tmp_path / "log").read_text()
    assert_trained(tmp_path, 2)


def test_slurm(tmp_path: Path) -> None:
    """What srun sets for two tasks on one node; SIGTERM, which its --signal sends, leaves a checkpoint."""
    job = SLURM | {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "4711", "SLURM_NODEID": "0"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = RankedRun(tmp_path, 2, *LONG, by="slurm", **job)
    run.ranks[0].until(lambda: bool(saved(tmp_path)) and _frame(tmp_path) > 48)
    for rank in run.ranks:
        rank.signal(signal.SIGTERM)
    assert run.wait() == [143, 143], run.text
    fit_ranks(tmp_path, 2, "--resume", next(tmp_path.glob("runs/*/*")), f"--data.total_frames={_frame(tmp_path) + 16}")


def _frame(folder: Path) -> int:
    return saved(folder)[-1].order[0]


def settings(**given: Any) -> dict[str, Any]:
    return {"devices": "auto", "num_nodes": 1, "strategy": "auto", "accelerator": "cpu"} | given


@pytest.mark.parametrize("env", [TORCHRUN, SLURM], ids=["torchrun", "srun"])
def test_what_a_launcher_has_started_is_taken_from_it(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for given in ({}, {"devices": "2"}, {"devices": 2, "num_nodes": 3}):
        changed = launching.trainer_settings(settings(**given))
        assert (changed["devices"], changed["num_nodes"]) == (2, 3)
        assert isinstance(changed["strategy"], DDPStrategy)
    with pytest.raises(SettingError, match="trainer.devices is 4: .* has started 2 processes on each of 3 nodes"):
        launching.trainer_settings(settings(devices=4))
    with pytest.raises(SettingError, match="trainer.strategy is ddp_spawn.*use ddp"):
        launching.trainer_settings(settings(strategy="ddp_spawn"))


def test_slurm_tasks_must_be_given_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(SettingError, match="--ntasks-per-node"):
        launching.trainer_settings(settings())


def test_one_process_needs_no_strategy() -> None:
    for given in ({}, {"devices": 1}, {"devices": "1"}):
        assert launching.trainer_settings(settings(**given)) == {}
    assert isinstance(launching.trainer_settings(settings(devices=2))["strategy"], DDPStrategy)
    assert isinstance(launching.trainer_settings(settings(num_nodes=2))["strategy"], DDPStrategy)
    reducer = settings(devices=2, strategy="ddp_find_unused_parameters_true")
    assert launching.trainer_settings(reducer) == {}, "as the user says"
    launching.trainer_settings(settings(strategy=DDPStrategy(find_unused_parameters=True)))
    for strategy in (DDPStrategy(start_method="spawn"), SimpleNamespace()):
        with pytest.raises(SettingError, match="trainer.strategy is .*use ddp"):
            launching.trainer_settings(settings(strategy=strategy))


def test_a_rank_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also while it is still waiting for the other ranks."""
    script = "import time\nfrom qsm_lightning import launching\nlaunching.GRACE = 0\n"
    script += "launching.end_with_parent()\ntime.sleep(100)"
    shell = f"{sys.executable} -c '{script}' & echo $!; sleep 100"
    env = os.environ | {"LOCAL_RANK": "1"}
    parent = subprocess.Popen(["bash", "-c", shell], env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    until(lambda: child.num_threads() > 1, tmp_path)
    time.sleep(5)
    assert child.is_running()
    parent.kill()
    until(lambda: gone(child), tmp_path, 10)
