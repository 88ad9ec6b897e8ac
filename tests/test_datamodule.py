"""Counting, what reaches the buffer, and its state."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from benchmarks.training import quiet_trainer
from pytorch_lightning import Callback, Trainer
from tensordict import TensorDict

from qsm_lightning import datamodule, datasets
from qsm_lightning.datamodule import OffPolicyDataModule, datamodule_of
from qsm_lightning.errors import SettingError
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.progress import Progress, RecentExperience
from qsm_lightning.replay import FRAME_KEYS
from qsm_lightning.seeding import Purpose
from tests.compare import curves, differences, rows, state
from tests.helpers import SHRINK, replay_batch
from tests.processes import trained

CLOCK = "tests.fake_envs:Clock-v0"


def train(tmp_path: Path, env: str = CLOCK, **settings: Any) -> tuple[OffPolicyModule, OffPolicyDataModule]:
    defaults = {"batch_size": 4, "init_random_frames": 20, "total_frames": 60, "eval_every_frames": 1000}
    data = OffPolicyDataModule(env, **(defaults | {"eval_episodes": 1, "buffer_size": 500} | settings))
    module = OffPolicyModule(data.observation_dim, data.action_dim, partial(QSM, hidden=(8,), time_dim=4, T=2))
    Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    ).fit(module, data)
    return module, data


@pytest.mark.parametrize(
    ("utd", "num_envs", "frames_per_batch"),
    [(1, 1, None), (1, 4, None), (0.25, 1, 3), (0.25, 4, 8), (3, 2, 2), (0.1, 1, 7), (0.29, 5, 25), (2, 3, 9)],
)
def test_updates_are_exactly_utd_times_the_frames_after_the_warm_up(
    tmp_path: Path, utd: float, num_envs: int, frames_per_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    monkeypatch.setattr(QSM, "update_targets", lambda self: steps.append(1))
    _, data = train(tmp_path, utd=utd, num_envs=num_envs, frames_per_batch=frames_per_batch)
    chunk = frames_per_batch or num_envs
    frames = math.ceil(60 / chunk) * chunk
    assert data.progress.frames == frames, "training stops at the first chunk that reaches total_frames"
    assert len(steps) == data.progress.updates == math.floor(Fraction(str(utd)) * (frames - 20))
    assert len(data.buffer) == frames


def test_a_run_is_the_same_whatever_a_training_batch_has(tmp_path: Path) -> None:
    """Bit by bit, rows of metrics at odd frames included; evaluations after 45 frames, the last one at the end."""
    shrunk = ["--config=pendulum", *SHRINK, "--data.eval_every_frames=45", "--data.total_frames=130", "--data.utd=0.7"]
    runs = []
    for n in (1, 3, "null"):
        (folder := tmp_path / str(n)).mkdir()
        runs.append(trained(folder, *shrunk, "--metrics.every_frames=7", f"--data.rounds_per_batch={n}"))
    one, three, all_of_them = runs
    found = [float(row["step"]) for row in rows(one) if "train/updates" in row]
    assert found == [*range(7, 130, 7), 130]
    for other in (three, all_of_them):
        different = differences(state(one), state(other))
        assert all("batch" in path for path in different), different  # how many of Lightning's batches there were
        assert rows(one) == rows(other)
        assert curves(one) == curves(other)


class Batches(Callback):
    """The frames after each training batch."""

    def __init__(self) -> None:
        self.ends: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.ends.append(datamodule_of(trainer).progress.frames)


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({}, [10, 20, 25, 35, 45, 50, 60]),
        ({"rounds_per_batch": 1}, list(range(1, 61))),
        ({"num_envs": 3}, [9, 18, 27, 36, 45, 54, 60]),
        ({"num_envs": 3, "rounds_per_batch": 2}, [6, 12, 18, 24, 27, 33, 39, 45, 51, 54, 60]),
        ({"frames_per_batch": 20}, [20, 40, 60]),
    ],
    ids=str,
)
def test_training_batches_end_at_evaluations(settings: dict[str, Any], ends: list[int], tmp_path: Path) -> None:
    """Every 25 frames, rounded up to whole rounds."""
    data = OffPolicyDataModule(
        CLOCK, **{"batch_size": 4, "init_random_frames": 20, "total_frames": 60, "eval_every_frames": 25} | settings
    )
    module = OffPolicyModule(2, 1, partial(QSM, hidden=(8,), time_dim=4, T=2))
    batches = Batches()
    quiet_trainer(tmp_path, callbacks=[batches]).fit(module, data)
    assert batches.ends == ends


@pytest.mark.parametrize("rounds_per_batch", [1, 10])
def test_no_training_batch_of_a_long_period_is_counted_twice(rounds_per_batch: int) -> None:
    settings = {"total_frames": 10_000_000, "eval_every_frames": 3_000_000, "rounds_per_batch": rounds_per_batch}
    data = OffPolicyDataModule(CLOCK, **settings)  # type: ignore[arg-type]
    assert len(data.train_dataloader()) == 3_000_000 / rounds_per_batch


def test_training_batches_end_where_a_callback_looks() -> None:
    """With the first round that reaches a multiple of 10; 60 is the end of the period as well."""
    data = OffPolicyDataModule(CLOCK, num_envs=3, eval_every_frames=60, rounds_per_batch=1000)
    data.end_batches_every(10)
    rounds = np.arange(1, 21)
    assert (3 * rounds[data._end_batch(rounds)]).tolist() == [12, 21, 30, 42, 51, 60]
    assert len(data.train_dataloader()) == 6


@pytest.mark.parametrize(
    ("processes", "env_timeout", "rank_timeout", "expected"),
    [(True, 50.0, 45.0, 60.0), (True, 50.0, 90.0, 90.0), (False, 50.0, 45.0, 45.0)],
)
def test_an_environment_that_hangs_is_found_before_its_rank(
    processes: bool, env_timeout: float, rank_timeout: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = datamodule.make_env
    monkeypatch.setattr(datamodule, "make_env", lambda name, count, **_: make(name, count))  # no processes needed
    data = OffPolicyDataModule(CLOCK, env_processes=processes, env_timeout=env_timeout, rank_timeout=rank_timeout)
    assert data.rank_timeout == expected


def test_every_random_stream_of_a_run_is_another() -> None:
    """Also of one that goes on later, or with environments built anew."""
    data = OffPolicyDataModule(CLOCK)
    seeds = []
    for frames in (0, 50):
        for restarts in (0, 1):
            data.progress = Progress(frames=frames, env_restarts=restarts)
            seeds += [data._seed(purpose, *worker) for purpose in Purpose for worker in ((), (0,), (1,))]
    assert len(set(seeds)) == len(seeds) == 4 * 3 * len(Purpose)


def test_buffer_and_dataset_are_sampled_by_streams_of_their_own(tmp_path: Path) -> None:
    datasets.save_npz(tmp_path / "data.npz", replay_batch(30, 2, 1))
    _, data = train(tmp_path, dataset=str(tmp_path / "data.npz"), total_frames=21)
    assert data.experience.offline is not None
    assert data.buffer._rng.initial_seed() != data.experience.offline._rng.initial_seed()


class Asked(Exception):
    """Its argument is what workers were asked for."""


class NoWorkers:
    """In place of workers: there is no need of any."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        raise Asked(settings)


def test_what_workers_are_asked_for_counts_over_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of three environments on each of two ranks; the warm-up is 60 frames, of which 24 are done."""
    monkeypatch.setattr(datamodule, "Workers", NoWorkers)
    data = OffPolicyDataModule(CLOCK, 3, 6, 1000, 60, 8, utd=0.5, collector="processes", collector_workers=2)
    module = OffPolicyModule(2, 1, partial(QSM, hidden=(8,), time_dim=4, T=2))
    with pytest.raises(Asked) as asked:
        quiet_trainer(tmp_path).fit(module, data)
    assert asked.value.args[0]["init_random_frames"] == 60
    assert data.buffer.copies == 6, "frames of an environment are that far apart"
    data.trainer = cast(Any, SimpleNamespace(lightning_module=module))
    data.ranks.count = 2
    for frames, left in ((24, 18), (60, 0), (300, 0)):
        data.progress.frames = frames
        with pytest.raises(Asked) as asked:
            data._start_workers()
        found = [asked.value.args[0][name] for name in ("init_random_frames", "updates_per_chunk", "max_staleness")]
        assert found == [left, 6, 6], "a chunk of each rank's 6 frames, half an update for each"


def test_no_update_is_lost_to_rounding() -> None:
    """0.29 * 100 is 28.999... in floating point; the count is 29."""
    progress = Progress(frames=100)
    assert progress.updates_owed(0.29, 0) == 29
    done = 0
    for frames in range(1, 1001):
        progress.frames = frames
        done += (owed := progress.updates_owed(0.1, 0))
        progress.updates = done
        assert owed in (0, 1)
    assert done == 100


@pytest.mark.parametrize("utd", [0.3, 1, 3])
def test_after_a_refill_updates_go_on_at_their_rate(utd: float) -> None:
    """None for as many frames as the warm-up; then what further frames are worth, and less than one frame's more."""
    warm_up = 7
    for stopped in range(warm_up, 40):
        progress = Progress(frames=stopped)
        progress.updates = progress.updates_owed(utd, warm_up)
        progress.refill(utd)
        for further in range(30):
            progress.frames = stopped + further
            worth = Fraction(str(utd)) * max(0, further - warm_up)
            most = worth + Fraction(str(utd)) if further > warm_up else Fraction(1)
            assert math.floor(worth) <= progress.updates_owed(utd, warm_up) < most


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_buffer_holds_true_transitions(tmp_path: Path, num_envs: int) -> None:
    """Clock shows its step and episode: no frame joins two episodes, ends carry their final observation and kind."""
    _, data = train(tmp_path, num_envs=num_envs, frames_per_batch=6, total_frames=90)
    frames = data.buffer[:]
    step, episode = frames["observation"].unbind(1)
    next_step, next_episode = frames["next", "observation"].unbind(1)
    assert torch.equal(next_step, step + 1)
    assert torch.equal(next_episode, episode)
    ends = next_step == 5
    assert ends.any()
    assert torch.equal(frames["next", "done"][:, 0], ends)
    assert torch.equal(frames["next", "terminated"][:, 0], ends & (episode % 2 == 1))
    assert (step < 5).all(), "the final observation was acted on"
    if num_envs == 1:
        assert torch.equal(step, torch.arange(90) % 5)
    assert data.progress.episodes == ends.sum()


def test_warm_up_actions_are_uniform_and_later_ones_are_the_policys(tmp_path: Path) -> None:
    class Constant(QSM):
        def exploration_policy(self) -> Any:
            return lambda td: td.set("action", torch.full((*td.shape, 1), 0.25))

    data = OffPolicyDataModule(CLOCK, 1, 7, 400, 300, 8, eval_every_frames=1000, eval_episodes=1)
    module = OffPolicyModule(2, 1, partial(Constant, hidden=(8,), time_dim=4, T=2))
    Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    ).fit(module, data)
    actions = data.buffer[:]["action"][:, 0]
    random, policys = actions[:301], actions[301:]  # the chunk of 7 that begins in the warm-up is random
    assert (policys == 0.25).all()
    assert abs(random.mean().item()) < 0.1
    assert abs(random.std().item() - 1 / math.sqrt(3)) < 0.05


def test_where_frames_are_kept_changes_nothing(tmp_path: Path) -> None:
    states = []
    for storage in ("memory", "memmap", "device"):
        torch.manual_seed(0)
        module, data = train(tmp_path, storage=storage, storage_dir=str(tmp_path / storage))
        frames = data.buffer[:].select(*FRAME_KEYS).clone().flatten_keys()
        states.append([*module.state_dict().values(), *frames.values()])
    assert (tmp_path / "memmap").exists()
    assert not list((tmp_path / "memmap").iterdir()), "the mapped files were left behind"
    for other in states[1:]:
        assert all(map(torch.equal, states[0], other))


def test_recent_experience_counts_episodes_and_bounds() -> None:
    recent = RecentExperience()
    chunk = TensorDict(
        {
            "action": torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.5, 0.2]]),
            "next": TensorDict(
                {
                    "done": torch.tensor([[False], [True], [True]]),
                    "episode_reward": torch.tensor([[9.0], [3.0], [5.0]]),
                    "step_count": torch.tensor([[7], [10], [20]]),
                },
                [3],
            ),
        },
        [3],
    )
    assert recent.metrics() == {}, "no share of no frames"
    assert recent.add(chunk) == 2
    assert recent.metrics() == {"actions_at_bounds": 0.5, "return": 4.0, "length": 15.0}


def test_the_age_of_weights_is_told_by_its_mean_and_its_maximum() -> None:
    assert RecentExperience(staleness=[1, 6, 2]).metrics() == {"staleness": 3.0, "staleness_max": 6}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"num_envs": 0}, "data.num_envs"),
        ({"total_frames": -5}, "data.total_frames"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"buffer_size": 0}, "data.buffer_size"),
        ({"utd": 0}, "data.utd"),
        ({"eval_every_frames": 0}, "data.eval_every_frames"),
        ({"eval_episodes": -1}, "data.eval_episodes"),
        ({"num_envs": 4, "frames_per_batch": 6}, "multiple of data.num_envs"),
        ({"frames_per_batch": -1}, "data.frames_per_batch"),
        ({"batch_size": 300, "init_random_frames": 256}, "data.init_random_frames"),
        ({"buffer_size": 100}, "data.buffer_size"),
        ({"env_timeout": 0}, "data.env_timeout"),
        ({"env_restarts": -1}, "data.env_restarts"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        OffPolicyDataModule(CLOCK, **setting)
