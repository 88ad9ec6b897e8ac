"""Collection by workers, in processes and by Ray: true transitions, weights of a bounded age, faults, going on."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from tensordict import TensorDict, TensorDictBase
from torch import nn

from qsm_lightning import workers
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import EnvironmentFault, SettingError, TrainingFault
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.replay import FRAME_KEYS
from qsm_lightning.workers import Workers
from tests.compare import last, rows, state
from tests.faulty_envs import NAME, plan
from tests.helpers import SHRINK, has
from tests.processes import Run, fit
from tests.test_env_faults import RAISED, assert_no_process_is_left, resume_arguments, run_of
from tests.versions import SCALE, Version, Versioned, VersionPolicy

needs_ray = pytest.mark.skipif(not has("ray"), reason="the extra ray is not installed")
KINDS = ["processes", pytest.param("ray", marks=[needs_ray, pytest.mark.slow])]
WORKERS, ENVS, CHUNK, WARM_UP, TOTAL, UTD = 2, 2, 20, 40, 240, 0.5
TINY = [
    *("--config=pendulum", *SHRINK, "--data.total_frames=96", "--data.eval_every_frames=96", f"--data.env={NAME}"),
    *("--data.eval_selector=sample", "--data.eval_episodes=1", "--metrics.every_frames=8"),
    *("--picture.every_evaluations=0", "--data.frames_per_batch=8"),
]


@functools.cache
def trained(kind: str) -> tuple[dict[str, torch.Tensor], list[int], int]:
    """The frames of a run, the staleness it noted of each chunk, and its episodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("PL_GLOBAL_SEED", "7")
        data = OffPolicyDataModule(
            "tests.fake_envs:Wanderer-v0",
            ENVS,
            CHUNK,
            TOTAL,
            WARM_UP,
            8,
            utd=UTD,
            buffer_size=1000,
            eval_every_frames=1000,
            eval_episodes=1,
            eval_selector="sample",
            collector=kind,  # type: ignore[arg-type]
        )
        module = OffPolicyModule(3, 1, partial(Versioned, hidden=(8,), time_dim=4, T=2))
        settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        Trainer(max_epochs=-1, **settings).fit(module, data)
    frames = data.buffer[:].select(*FRAME_KEYS).clone().flatten_keys()
    return dict(frames.items()), data.recent.staleness, data.progress.episodes


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_true_and_their_weights_as_old_as_is_said(kind: str) -> None:
    """Everything is told by the frames themselves; whatever the workers are, they are the same bit by bit."""
    frames, noted, episodes = trained(kind)
    check_transitions(frames, episodes)
    check_random_streams(frames)
    check_staleness(frames, noted)
    if kind == "ray":
        others, _, _ = trained("processes")
        assert all(torch.equal(frames[key], others[key]) for key in frames)


def check_transitions(frames: dict[str, torch.Tensor], episodes: int) -> None:
    """Each environment's frames follow one another, within its episodes."""
    assert len(frames["action"]) == TOTAL
    assert frames["next.done"].sum() == episodes > 0
    copies = WORKERS * ENVS
    for i in range(copies):
        mine = {key: value[i::copies] for key, value in frames.items()}
        within = ~mine["next.done"][:-1, 0]
        assert torch.equal(mine["observation"][1:][within], mine["next.observation"][:-1][within])
        assert not torch.equal(mine["observation"][1:][~within], mine["next.observation"][:-1][~within])


def check_random_streams(frames: dict[str, torch.Tensor]) -> None:
    """No two environments begin alike or act alike, in the warm-up and later."""
    copies = WORKERS * ENVS
    assert len(frames["observation"][:copies, 0].unique()) == copies
    for start in (0, WARM_UP):
        assert len(frames["action"][start : start + CHUNK].unique()) == CHUNK


def check_staleness(frames: dict[str, torch.Tensor], noted: list[int]) -> None:
    """Updates go on while workers collect, and weights are those of one chunk before."""
    chunks = frames["action"].view(-1, CHUNK)
    done = [math.floor(UTD * max(0, i * CHUNK - WARM_UP)) for i in range(len(chunks))]  # when chunk i arrives
    assert noted == [now - before for before, now in zip([0, *done], done, strict=False)]
    assert max(noted) == UTD * CHUNK
    for i in range(WARM_UP // CHUNK, len(chunks)):
        version = (chunks[i] * SCALE).floor()
        assert (version == done[i] - noted[i]).all()


class Pretended:
    """A collector whose frames tell the weights that they were made with."""

    def __init__(self) -> None:
        self.version, self.sent = -1.0, 0

    def update_policy_weights_(self, weights: TensorDictBase) -> None:
        self.version, self.sent = weights["version", "count"].item(), self.sent + 1

    def iterator(self) -> Iterator[TensorDict]:
        while True:
            yield TensorDict({"version": torch.full((1, 1), self.version)}, [1, 1])


@pytest.mark.parametrize("per_chunk", [1, 3, 10])
@pytest.mark.parametrize("bound", [0, 2, 9, 10, 25])
def test_staleness_keeps_its_bound(bound: int, per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended()
    monkeypatch.setattr(workers, "_processes", lambda *args, **settings: pretended)
    policy = VersionPolicy(Version())
    count = policy.version.count
    source = pretended_workers(policy, max_staleness=bound, updates_per_chunk=per_chunk, updates=lambda: int(count))
    ages = []
    for _ in range(100):
        age = count.item() - next(source)["version"].item()
        assert age == source.staleness
        ages.append(source.staleness)
        count += per_chunk
    source.close()
    assert max(ages) <= bound
    assert max(ages) > bound - per_chunk, "weights were sent more often than needed"
    chunks_of_one = bound // per_chunk + (bound < per_chunk)
    assert pretended.sent <= 100 / chunks_of_one + 2


def unmade() -> Any:
    raise AssertionError("no environment is needed")


def pretended_workers(policy: nn.Module, **settings: Any) -> Workers:
    defaults: dict[str, Any] = {"max_staleness": 1, "updates_per_chunk": 1, "updates": lambda: 0, "timeout": 5.0}
    return Workers(
        "processes",
        unmade,
        [(0, 0)],
        policy,
        frames_per_batch=1,
        init_random_frames=0,
        **(defaults | settings),
    )


@pytest.mark.parametrize(
    ("error", "fault", "said"),
    [
        (RuntimeError("At least one process failed.\nSee the log."), EnvironmentFault, r"died \(.*failed\)$"),
        (
            RuntimeError("in its creation task\n  x.y.EnvironmentFault: the environment A failed\n"),
            EnvironmentFault,
            "^the environment A failed$",
        ),
        (TrainingFault("the policy's action is NaN"), TrainingFault, "NaN"),
        (SettingError("data.collector_workers is 9"), SettingError, "is 9"),
        (None, EnvironmentFault, r"did not answer within 0.2 s \(data.env_timeout\)"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_a_fault_in_one_sentence(
    error: Exception | None, fault: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    class Failing(Pretended):
        def iterator(self) -> Iterator[TensorDict]:
            if error is None:
                ended.wait(5)
            raise error or RuntimeError
            yield

    def build(ending: ExitStack, *args: Any, **settings: Any) -> Failing:
        ending.callback(ended.set)
        return Failing()

    monkeypatch.setattr(workers, "_processes", build)
    policy = VersionPolicy(Version())
    with pytest.raises(fault, match=said) as caught:
        next(pretended_workers(policy, timeout=0.2))
    assert "\n" not in str(caught.value)
    assert ended.is_set()


def test_weights_that_are_not_finite_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_processes", lambda *args, **settings: Pretended())
    policy = VersionPolicy(Version())
    policy.version.count.fill_(torch.nan)
    source = pretended_workers(policy)
    with pytest.raises(TrainingFault, match="weight"):
        next(source)
    source.close()


def test_nothing_is_left_of_workers_that_were_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_processes", lambda *args, **settings: Pretended())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(threading.enumerate())
    source = pretended_workers(VersionPolicy(Version()))
    next(source)
    (thread,) = set(threading.enumerate()) - before
    assert len(list(tmp_path.glob("qsm-workers-*"))) == 1
    source.close()
    thread.join(5)
    assert not thread.is_alive()
    assert not list(tmp_path.iterdir())


@needs_ray
@pytest.mark.slow
def test_a_failed_environment_by_ray_stops_the_run_and_processes_go_on_with_it(tmp_path: Path) -> None:
    plan(tmp_path, "raise", 20)
    text = fit(tmp_path, *TINY, "--data.collector=ray", status=3)
    sentence = text.strip().splitlines()[-2]
    assert f"environment {NAME} failed {RAISED}, after frame " in sentence
    assert "Traceback" not in text
    assert_no_process_is_left(tmp_path)
    run = run_of(tmp_path)
    frames = last(run).order[0]
    assert frames == state(run)["OffPolicyDataModule"]["progress"]["frames"] < 96
    text = fit(tmp_path, *resume_arguments(text), "--data.collector=processes")
    assert f"from frame {frames}" in text
    assert text.count("begins new episodes") == 1
    content = state(run)["OffPolicyDataModule"]
    assert [content["progress"][key] for key in ("frames", "updates", "env_restarts")] == [96, 56, 0]
    staleness = [float(row["train/staleness_max"]) for row in rows(run) if "train/staleness_max" in row]
    assert max(staleness) == 8
    assert_no_process_is_left(tmp_path)


def test_workers_are_started_anew_whatever_ended_them(tmp_path: Path) -> None:
    """One dies, later one hangs; then a signal stops the run."""
    plan(tmp_path, "kill", 10)
    plan(tmp_path, "hang", 14)
    long = ["--data.total_frames=100000", "--data.eval_every_frames=100000", "--data.buffer_size=100000"]
    run = Run(tmp_path, *TINY, *long, "--data.collector=processes", "--data.env_timeout=5", "--data.env_restarts=2")
    run.until(lambda: "built anew (2 of 2)" in run.text)
    run.until(lambda: len(rows(run_of(tmp_path))) > 40)
    run.signal(signal.SIGTERM)
    assert run.wait(30) == 143, run.text
    died, hung = (line for line in run.text.splitlines() if "built anew" in line)
    assert "a worker of data.collector died" in died
    assert "did not answer within 5 s (data.env_timeout)" in hung
    assert "Traceback" not in run.text
    assert "resume with" in run.text
    assert_no_process_is_left(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"collector_workers": 0}, "data.collector_workers is 0"),
        ({"collector": "processes", "collector_max_staleness": -1}, "data.collector_max_staleness is -1"),
        ({"collector": "processes", "env_processes": True}, "data.env_processes"),
        ({"collector": "processes", "num_envs": 2, "frames_per_batch": 6}, r"data.collector_workers \(2 \* 2\)"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        OffPolicyDataModule("tests.fake_envs:Clock-v0", **settings)


def test_a_missing_ray_is_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'qsm-lightning\[ray\]'"):
        OffPolicyDataModule("tests.fake_envs:Clock-v0", collector="ray")


def test_more_workers_than_ray_has_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small: Any = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 2.0})
    monkeypatch.setitem(sys.modules, "ray", small)
    with pytest.raises(SettingError, match="data.collector_workers is 3: Ray has 2 CPUs"):
        workers._ray(ExitStack(), [unmade] * 3, nn.Identity())
