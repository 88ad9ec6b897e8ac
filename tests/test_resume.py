"""A run that was stopped goes on as if nothing had happened: bit by bit, in its own folder."""

from __future__ import annotations

import inspect
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qsm_lightning import checkpoints, resume
from qsm_lightning.datamodule import OffPolicyDataModule
from tests.compare import assert_same, curves, differences, last, rows, state
from tests.helpers import SHRINK, needs_dmc, needs_envpool
from tests.processes import Run, fit

TINY = [
    *("--config=pendulum", *SHRINK, "--data.total_frames=90", "--data.eval_every_frames=30"),
    *("--data.eval_selector=sample", "--data.eval_episodes=1", "--metrics.every_frames=10"),
]
MOVING = "continuous:Pendulum-v1?max_speed=20&sigma=0.5"
# name: settings, and the frames of the checkpoints that it is resumed from
EXACT = {
    "Pendulum": ([], [15, 30, 45]),
    "Hopper, memory-mapped": (["--data.env=Hopper-v5", "--data.storage=memmap"], [45]),
    "dm_control": (["--data.env=dmc:reacher/easy"], [45]),
    "a model changed at resets": (["--data.env=dmc:fish/swim"], [75]),
    "parallel environments": (["--data.env=Hopper-v5", "--data.num_envs=3", "--data.frames_per_batch=6"], [18, 48, 66]),
    "parallel Ants": (["--data.env=Ant-v5", "--data.num_envs=3", "--data.frames_per_batch=6"], [18, 48, 66]),
    "several dm_control tasks": (["--data.env=dmc:cartpole/swingup", "--data.num_envs=2"], [46]),
    "fractional utd": (["--data.utd=0.3"], [45, 61]),
    "several updates a frame": (["--data.utd=3"], [45]),
    "a ring that wraps": (["--data.buffer_size=33"], [15, 45, 75]),
    "float64": (["--trainer.precision=64-true"], [15, 45]),
    "bfloat16": (["--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=0.5"], [45]),
    "averaged and clipped": (["--model.ema=0.9", "--trainer.gradient_clip_val=0.5"], [45, 60]),
    "M_q fixed, slopes at noisy actions": (["--model.loss.m_q=1", "--model.loss.score_at=noisy"], [45]),
    "clipped, compiled": (["--trainer.gradient_clip_val=0.5", "--model.compile=true"], [45]),
    "SAC": (["--model.loss=sac"], [15, 45]),
    "TD3 between two steps of its policy": (["--model.loss=td3"], [45]),
    "TD3, compiled": (["--model.loss=td3", "--model.compile=true"], [45]),
    "Diffusion-QL": (["--model.loss=diffusion_ql"], [45]),
    "SDAC": (["--model.loss=sdac"], [45]),
    "CQSM in irregular time": (["--model.loss=cqsm", f"--data.env={MOVING}&jitter=0.5&horizon=1.7"], [15, 45]),
    "CQSM with a trace": (
        ["--model.loss=cqsm", "--model.loss.evaluation=trace", "--model.loss.window=4", f"--data.env={MOVING}"],
        [45],
    ),
    "DACER": (["--model.loss=dacer", "--model.loss.alpha_every=4", "--model.loss.entropy_samples=5"], [45]),
    "an environment's own state": (["--data.env=tests.fake_envs:Wanderer-v0", "--data.frames_per_batch=3"], [18, 48]),
}


FIXED = {
    *("env", "num_envs", "frames_per_batch", "init_random_frames", "batch_size", "buffer_size", "utd"),
    *("eval_selector", "eval_candidates", "offline_frames", "offline_share"),
}


def test_what_makes_a_run_what_it_is_is_compared_and_the_rest_may_change() -> None:
    settings = {name: p.default for name, p in inspect.signature(OffPolicyDataModule).parameters.items()}

    def identity(**others: Any) -> dict[str, Any]:
        return dict(resume.identity(settings | others, {"loss": {"class_path": "QSM", "init_args": {}}}, {}))

    compared = {name for name in settings if identity(**{name: "another"}) != identity()}
    assert compared == FIXED
    assert settings.keys() - FIXED == resume.FREE


def run_folder(folder: Path) -> Path:
    return next(folder.glob("runs/*/version_0"))


MARKS: dict[str, Any] = {
    "dm_control": needs_dmc,
    "a model changed at resets": [needs_dmc, pytest.mark.slow],
    "several dm_control tasks": [needs_dmc, pytest.mark.slow],
    "parallel Ants": pytest.mark.slow,
    "several updates a frame": pytest.mark.slow,
    "clipped, compiled": pytest.mark.slow,
    "TD3, compiled": pytest.mark.slow,
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=MARKS.get(case, ())) for case in EXACT])
def test_going_on_is_bitwise_equal_to_never_having_stopped(case: str, tmp_path: Path) -> None:
    """Every checkpoint of a run, in the warm-up, between evaluations, at one, in the middle of episodes."""
    settings, frames = EXACT[case]
    whole = tmp_path / "whole"
    whole.mkdir()
    fit(whole, *TINY, *settings, "--checkpoint.every_frames=15", "--checkpoint.keep_last=100")
    for frame in frames:
        again = tmp_path / str(frame)
        shutil.copytree(whole, again)
        run = run_folder(again)
        start = next(c for c in checkpoints.complete(run / "checkpoints") if c.order[0] >= frame)
        out = fit(again, "--config", run / "config.yaml", "--ckpt_path", start.path, "--trust")
        assert f"from frame {start.order[0]}" in out
        assert "begins new episodes" not in out
        assert_same(run_folder(whole), run)
        assert len(list(again.glob("runs/*/*"))) == 1, "it went on elsewhere"


@pytest.mark.parametrize("half", [85, pytest.param(90, marks=pytest.mark.slow)])
def test_twice_as_long_is_the_same_as_two_runs(half: int, tmp_path: Path) -> None:
    """N frames, exit, a new process, N more; N need not be a multiple of anything."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "one", *TINY, f"--data.total_frames={2 * half}")
    fit(tmp_path / "two", *TINY, f"--data.total_frames={half}")
    run = run_folder(tmp_path / "two")
    fit(tmp_path / "two", "--resume", run, f"--data.total_frames={2 * half}")
    whole = run_folder(tmp_path / "one")
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["total_frames"] == 2 * half
    if half == 90:
        assert_same(whole, run)
        assert [step for step, _ in curves(run)["eval/return"]] == [30, 60, 90, 120, 150, 180]
        return
    different = differences(state(whole), state(run))  # the batch and the evaluation that ended the first half count
    assert all("best_return" in d or "PolicyPicture" in d or "batch" in d for d in different), different
    extra = [row for row in rows(run) if row not in rows(whole)]
    assert [float(row["step"]) for row in extra] == [half, half]
    assert [row for row in rows(run) if row not in extra] == rows(whole)


@pytest.mark.parametrize(
    ("place", "signum", "status"),
    [
        ("warm-up", signal.SIGINT, 130),
        ("update", signal.SIGTERM, 143),
        ("evaluation", signal.SIGINT, 130),
        pytest.param("warm-up", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("update", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("evaluation", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_with_a_checkpoint_from_anywhere(place: str, signum: int, status: int, tmp_path: Path) -> None:
    """Going on from there is exact as well."""
    settings = {
        "warm-up": ["--data.init_random_frames=3000", "--data.total_frames=3010", "--data.eval_every_frames=3010"],
        "update": [
            *("--data.frames_per_batch=400", "--data.total_frames=1200", "--data.eval_every_frames=1200"),
            "--data.storage=memmap",
        ],
        "evaluation": ["--data.eval_episodes=20", "--data.eval_selector=best_of_n"],
    }[place]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    whole = Run(tmp_path / "one", *TINY, *settings)
    stopped = Run(tmp_path / "two", *TINY, *settings)
    stopped.until(lambda: "replay buffer" in stopped.text)
    if place == "update":
        stopped.until(lambda: bool(list(tmp_path.glob("two/runs/*/*/replay-*/**/*.memmap"))))
    if place == "evaluation":
        stopped.until(lambda: bool(list(tmp_path.glob("two/runs/*/*/metrics.csv"))))
        stopped.until(lambda: len((run_folder(tmp_path / "two") / "metrics.csv").read_text().splitlines()) > 3)
    time.sleep(0.7)
    stopped.signal(signum)
    assert stopped.wait(30) == status, stopped.text
    assert "resume with: qsm-fit --resume" in stopped.text
    assert "Traceback" not in stopped.text
    run = run_folder(tmp_path / "two")
    if place == "update":
        owed = state(run)["OffPolicyDataModule"]["ranks"][0]["owed"]
        assert owed is not None, "not within a batch of updates"
    fit(tmp_path / "two", *stopped.text.split("resume with: qsm-fit ")[1].split())
    assert whole.wait() == 0
    assert_same(run_folder(tmp_path / "one"), run)


@pytest.mark.parametrize("utd", [3, 0.5])
def test_the_learning_rate_goes_by_updates_also_after_a_resume(utd: float, tmp_path: Path) -> None:
    """As logged: the denoiser's on its cosine, the critics' constant."""
    settings = [f"--data.utd={utd}", "--model.actor_lr=0.002", "--model.actor_lr_decay_updates=100"]
    fit(tmp_path, *TINY, *settings)
    run = run_folder(tmp_path)
    fit(tmp_path, "--resume", run, "--data.total_frames=120")
    logged = [row for row in rows(run) if "lr/actor" in row]
    assert [float(row["step"]) for row in logged] == list(range(10, 121, 10))
    for row in logged:
        updates = math.floor(utd * max(0, float(row["step"]) - 40))
        assert float(row["train/updates"]) == updates
        expected = 0.002 * 0.5 * (1 + math.cos(math.pi * min(updates / 100, 1)))
        assert float(row["lr/actor"]) == pytest.approx(expected, abs=1e-9)
        assert float(row["lr/qvalue"]) == 3e-4


def test_sigusr1_writes_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    run = Run(
        tmp_path, *TINY, "--data.total_frames=6000", "--data.init_random_frames=5900", "--data.eval_every_frames=6000"
    )
    run.until(lambda: "replay buffer" in run.text)
    run.until(lambda: bool(list(tmp_path.glob("runs/*/*/metrics.csv"))))
    run.signal(signal.SIGUSR1)
    run.until(lambda: bool(list(tmp_path.glob("runs/*/*/checkpoints/0*"))))
    assert run.wait() == 0, run.text
    first, *_, end = checkpoints.complete(run_folder(tmp_path) / "checkpoints")
    assert 0 < first.order[0] < 6000
    assert end.order[0] == 6000


def test_the_wall_clock_stops_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    settings = ["--data.total_frames=3000", "--data.init_random_frames=2900", "--data.eval_every_frames=1000"]
    whole = Run(tmp_path / "one", *TINY, *settings)
    fit(tmp_path / "two", *TINY, *settings, "--trainer.max_time={seconds: 1}")
    run = run_folder(tmp_path / "two")
    frames = last(run).order[0]
    assert 0 < frames < 3000
    out = fit(tmp_path / "two", "--resume", run, status=2)
    assert "trainer.max_time" in out
    fit(tmp_path / "two", "--resume", run, "--trainer.max_time=null")
    assert whole.wait() == 0
    one, two = state(run_folder(tmp_path / "one")), state(run)
    different = differences(one, two)
    assert all("RunCheckpoint" in d or "PolicyPicture" in d for d in different), different
    extra = [row for row in rows(run) if row not in rows(run_folder(tmp_path / "one"))]
    assert {float(row["step"]) for row in extra} == {frames}, "but for the evaluation at the stop the curves agree"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["--data.env=envpool:Pendulum-v1", "--data.num_envs=2"], marks=needs_envpool),
        pytest.param(["--data.env_processes=true", "--data.num_envs=2"], marks=pytest.mark.slow),
        ["--data.env=tests.fake_envs:Secret-v0"],
    ],
    ids=["envpool", "processes", "unknown attributes"],
)
def test_without_the_environments_state_the_rest_goes_on_exactly(settings: list[str], tmp_path: Path) -> None:
    """Said when the run starts and when it goes on; episodes begin anew, and nothing else does."""
    out = fit(tmp_path, *TINY, *settings)
    assert out.count("cannot give its state") == 1
    run = run_folder(tmp_path)
    before = state(run)
    out = fit(tmp_path, "--resume", run, "--data.total_frames=91", "--trust")
    assert out.count("begins new episodes") == 1
    after = state(run)
    ranks = [content["OffPolicyDataModule"]["ranks"][0] for content in (before, after)]
    for key, value in ranks[0]["replay"].items():
        assert torch.equal(value, ranks[1]["replay"][key][:90])
    assert ranks[1]["progress"]["updates"] - ranks[0]["progress"]["updates"] == len(ranks[1]["replay"]["action"]) - 90
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "runs", again / "runs")
    checkpoint = checkpoints.complete(run_folder(again) / "checkpoints")[-2]
    args = ["--ckpt_path", checkpoint.path, "--data.total_frames=91", "--trust"]
    fit(again, "--config", run_folder(again) / "config.yaml", *args)
    assert_same(run, run_folder(again))  # new episodes from derived seeds, the same every time


def test_without_its_buffer_a_run_refills_one_first(tmp_path: Path) -> None:
    """With its policy's frames, as many as the warm-up, that are worth no updates; said in one line."""
    fit(tmp_path, *TINY, "--data.save_buffer=false")
    run = run_folder(tmp_path)
    assert not list((run / "checkpoints" / "replay").glob("*"))
    updates = last(run).manifest(), checkpoints.load(last(run).state)["OffPolicyDataModule"]["progress"]["updates"]
    out = fit(tmp_path, "--resume", run, "--data.total_frames=100")
    out = fit(tmp_path, "--resume", run, "--data.total_frames=180")
    assert "40 frames are collected before updates go on, and what follows differs" in out
    progress = checkpoints.load(last(run).state)["OffPolicyDataModule"]["progress"]
    assert progress["frames"] == 180
    assert progress["updates"] == updates[1] + 180 - 100 - 40, "the refill begun before the second stop begins again"
    logged = {int(float(row["step"])): row for row in rows(run) if "train/updates" in row}
    assert [float(logged[frame]["train/updates"]) for frame in (90, 100, 140, 150, 180)] == [50, 50, 50, 60, 90]
    assert float(logged[100]["train/buffer_size"]) == 10


def test_a_run_can_go_back_and_take_another_way(tmp_path: Path) -> None:
    """From an older checkpoint: its curves are cut there, and the newer checkpoints stay, out of the way."""
    fit(tmp_path, *TINY, "--checkpoint.keep_last=9")
    run = run_folder(tmp_path)
    fit(tmp_path, "--resume", run / "checkpoints" / "000000030", "--data.total_frames=50")
    assert [c.path.name for c in checkpoints.complete(run / "checkpoints")] == ["000000030", "000000050"]
    for name in ("000000060", "000000090"):
        aside = checkpoints.Checkpoint(run / "checkpoints" / f"{name}.aside")
        aside.verify()
    assert [step for step, _ in curves(run)["eval/return"]] == [30, 50]
    assert {float(row["step"]) for row in rows(run)} == {10, 20, 30, 40, 50}


def test_early_stopping_counts_the_evaluation_that_a_checkpoint_is_of(tmp_path: Path) -> None:
    """Episodes are all of one length, so that the fourth evaluation is the third without a shorter one."""
    stopping = [f"--trainer.callbacks{end}" for end in ("+=EarlyStopping", ".monitor=eval/length", ".patience=3")]
    args = [*TINY, *stopping, "--data.eval_every_frames=20"]
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    fit(tmp_path / "whole", *args, "--data.total_frames=200")
    fit(tmp_path / "parts", *args, "--data.total_frames=60")
    fit(tmp_path / "parts", "--resume", run_folder(tmp_path / "parts"), "--data.total_frames=200")
    assert [last(run_folder(tmp_path / part)).order[0] for part in ("whole", "parts")] == [80, 80]


def test_a_run_without_evaluations_ends_and_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, *TINY, "--trainer.limit_val_batches=0")
    run = run_folder(tmp_path)
    fit(tmp_path, "--resume", run, "--data.total_frames=120")
    assert last(run).order[0] == 120
    assert curves(run).keys().isdisjoint({"eval/return"})
