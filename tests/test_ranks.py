"""Runs of several processes as a user meets them: signals, faults, going on, evaluating, what is printed and logged."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.checkpoint import random_frames
from tensordict import TensorDict

from qsm_lightning import checkpoints
from qsm_lightning.distributed import Ranks
from qsm_lightning.progress import Progress, RecentExperience
from qsm_lightning.replay import ReplayArchive, make_replay_buffer
from qsm_lightning.sharding import adopt, part_of_frames
from qsm_lightning.watch import Watch
from tests.compare import assert_same, curves, last, rows, state
from tests.faulty_envs import NAME, plan
from tests.helpers import SHRINK, replay_batch
from tests.processes import RankedRun, Run, fit_ranks
from tests.ranked import frames_of
from tests.test_replay import frames as numbered

TINY = [
    *("--config=pendulum", *SHRINK, "--data.total_frames=96", "--data.eval_every_frames=32"),
    *("--data.eval_selector=sample", "--data.eval_episodes=3", "--metrics.every_frames=16"),
    "--picture.every_evaluations=0",
]
FAULTY = [*TINY, f"--data.env={NAME}", "--trust"]
LONG = [*TINY, "--data.total_frames=1000000", "--data.eval_every_frames=1000000"]


def run_of(folder: Path) -> Path:
    return next(folder.glob("runs/*/version_0"))


def frames_in(run: Path) -> list[dict[str, Any]]:
    """What each rank's buffer holds."""
    return [rank["replay"] for rank in state(run)["OffPolicyDataModule"]["ranks"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks, with checkpoints in the warm-up, between evaluations and at one."""
    folder = tmp_path_factory.mktemp("whole")
    text = fit_ranks(folder, 2, *TINY, "--checkpoint.every_frames=16", "--checkpoint.keep_last=100")
    (folder / "text").write_text(text)
    return folder


def test_one_folder_and_one_voice(whole: Path) -> None:
    text = (whole / "text").read_text()
    assert [str(p.relative_to(whole)) for p in whole.glob("runs/*/*")] == ["runs/Pendulum-v1/version_0"]
    for once in ("replay buffer:", "final return:", "frames 96/96", "next: qsm-eval"):
        assert text.count(once) == 1, text
    run = run_of(whole)
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert [step for step, _ in curves(run)["eval/return"]] == [32, 64, 96]
    (final,) = [row for row in rows(run) if row["step"] == "96" and "train/buffer_size" in row]
    assert float(final["train/buffer_size"]) == 96, "counted over all ranks"
    assert float(final["train/updates"]) == 96 - 40, "data.utd holds over all ranks"


def test_the_warm_up_and_the_buffer_count_over_all_ranks(whole: Path) -> None:
    content = state(run_of(whole))["OffPolicyDataModule"]
    assert content["progress"]["frames"] == 96
    assert [rank["written"] for rank in content["ranks"]] == [48, 48]
    assert [rank["capacity"] for rank in content["ranks"]] == [500, 500]


def test_an_evaluation_has_the_same_starts_on_any_number_of_ranks(tmp_path: Path) -> None:
    env = ["--data.env=tests.fake_envs:Start-v0", "--trust", "--data.total_frames=42", "--data.eval_every_frames=42"]
    found = []
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        fit_ranks(folder, count, *TINY, *env)
        found.append({k: v for k, v in curves(run_of(folder)).items() if k.startswith("eval/")})
    assert found[0]["eval/return_std"][0][1] > 0
    for other in found[1:]:  # with four ranks, one has no episode
        assert {tag: [v for _, v in points] for tag, points in other.items()} == {
            tag: [v for _, v in points] for tag, points in found[0].items()
        }


def test_going_on_is_bitwise_with_few_updates(tmp_path: Path) -> None:
    """The last losses are each rank's own until the next update, and so are their means in the curves."""
    settings = [*TINY, "--data.utd=0.125", "--data.storage=memmap"]
    settings += ["--checkpoint.every_frames=2", "--checkpoint.keep_last=100"]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    fit_ranks(one, 2, *settings)
    shutil.copytree(one, two)
    start = next(c for c in checkpoints.complete(run_of(two) / "checkpoints") if c.order[0] == 58)
    fit_ranks(two, 2, "--config", run_of(two) / "config.yaml", "--ckpt_path", start.path)
    assert_same(run_of(one), run_of(two))
    assert not list(tmp_path.rglob("replay-*")), "mapped files were left"


@pytest.mark.parametrize("frame", [16, 48, 64])
def test_going_on_is_bitwise(frame: int, whole: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    run = run_of(again)
    start = next(c for c in checkpoints.complete(run / "checkpoints") if c.order[0] >= frame)
    fit_ranks(again, 2, "--config", run / "config.yaml", "--ckpt_path", start.path)
    assert_same(run_of(whole), run)
    assert len(list(again.glob("runs/*/*"))) == 1


@pytest.mark.parametrize("utd", ["5", pytest.param("1", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_at_one_point(utd: str, tmp_path: Path) -> None:
    """Also within the updates of a batch; and the run goes on to the end that it would have had."""
    settings = [*TINY, "--data.total_frames=4096", "--data.eval_every_frames=4096", f"--data.utd={utd}"]
    settings += ["--data.frames_per_batch=8", "--model.loss.hidden=[64,64]"]
    stopped = RankedRun(tmp_path, 2, *settings)
    stopped.ranks[0].until(lambda: "replay buffer" in stopped.text)
    stopped.ranks[1].until(lambda: any(tmp_path.glob("runs/*/*/metrics.csv")) and _updates(tmp_path) > 30)
    stopped.ranks[1].signal(signal.SIGTERM)
    assert stopped.wait() == [143, 143], stopped.text
    assert stopped.text.count("interrupted by SIGTERM") == 1
    run = run_of(tmp_path)
    ranks = state(run)["OffPolicyDataModule"]["ranks"]
    assert ranks[0]["progress"] == ranks[1]["progress"]
    end = ranks[0]["progress"]["frames"] // 16 * 16 + 64
    fit_ranks(tmp_path, 2, "--resume", run, f"--data.total_frames={end}")
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    fit_ranks(undisturbed, 2, *settings, f"--data.total_frames={end}")
    assert_same(run_of(undisturbed), run)


def _updates(folder: Path) -> float:
    return max((float(row.get("train/updates", 0)) for row in rows(run_of(folder))), default=0)


def test_sigusr1_to_one_rank_saves_on_all_and_on_it_goes(tmp_path: Path) -> None:
    run = RankedRun(tmp_path, 2, *LONG)
    run.ranks[1].until(lambda: any(tmp_path.glob("runs/*/*/metrics.csv")) and _updates(tmp_path) > 10)
    run.ranks[1].signal(signal.SIGUSR1)
    run.ranks[1].until(lambda: bool(checkpoints.complete(run_of(tmp_path) / "checkpoints")))
    last(run_of(tmp_path))
    run.ranks[0].signal(signal.SIGINT)
    assert run.wait() == [130, 130], run.text


@pytest.mark.parametrize(
    ("rank", "signum"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGKILL),
        (0, signal.SIGSTOP),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_rank_that_is_lost_ends_the_run(rank: int, signum: signal.Signals, tmp_path: Path) -> None:
    run = RankedRun(tmp_path, 2, *LONG, "--checkpoint.every_frames=16")
    run.ranks[rank].until(lambda: bool(_complete(tmp_path)))
    began = time.monotonic()
    run.ranks[rank].signal(signum)
    other = run.ranks[1 - rank]
    assert other.wait() == 3, run.text
    assert run.ranks[rank].wait(10) == 137, "a stopped one is killed by the other"
    assert time.monotonic() - began < 60
    assert f"rank {rank} " in other.text
    assert ("ended without a word" in other.text) == (signum == signal.SIGKILL), other.text
    newest = last(run_of(tmp_path))
    assert f"the run's last state is in {newest.path.relative_to(tmp_path)}" in other.text
    assert "Traceback" not in run.text


def _complete(folder: Path) -> list[checkpoints.Checkpoint]:
    return [c for path in folder.glob("runs/*/*/checkpoints") for c in checkpoints.complete(path)]


@pytest.mark.parametrize("fault", ["hang", pytest.param("spin", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_run(fault: Any, tmp_path: Path) -> None:
    plan(tmp_path, fault, 30, rank=1)
    run = RankedRun(tmp_path, 2, *FAULTY, "--checkpoint.every_frames=16", "--data.rank_timeout=15")
    assert run.wait(90) == [3, 137] or run.wait() == [3, 3], run.text
    assert "no rank got on for 15 s; rank 1 hangs in _fault (" in run.ranks[0].text
    assert "faulty_envs.py, line" in run.ranks[0].text
    last(run_of(tmp_path))


def test_a_bug_on_one_rank_ends_the_run_and_is_shown(tmp_path: Path) -> None:
    run = RankedRun(tmp_path, 2, *LONG, "--checkpoint.every_frames=16", "--model.loss=tests.ranked.Buggy", "--trust")
    began = time.monotonic()
    assert run.wait() in ([3, 1], [3, 137]), run.text
    assert time.monotonic() - began < 60
    assert "ValueError: a planted bug" in run.ranks[1].text
    assert "rank 1 failed: ValueError: a planted bug; the run's last state is in" in run.ranks[0].text
    last(run_of(tmp_path))


def test_a_failed_environment_of_one_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    plan(tmp_path, "raise", 30, rank=1)
    text = fit_ranks(tmp_path, 2, *FAULTY, status=3)
    assert text.count("(ValueError: the robot fell over)") == 1, text
    assert "rank 1: the environment" in text
    assert last(run_of(tmp_path)).order[0] == 58
    fit_ranks(tmp_path, 2, "--resume", run_of(tmp_path), "--trust")
    assert state(run_of(tmp_path))["OffPolicyDataModule"]["progress"]["frames"] == 96


@pytest.mark.parametrize(
    ("order", "status"),
    [
        ({"at": "reset", "age": 0, "rank": 1}, "; nothing was saved"),
        ({"where": "video", "age": 3, "rank": 0}, "; the run's last state is in "),  # of before the evaluation
    ],
)
def test_a_fault_elsewhere_on_one_rank_is_said_at_once(order: dict[str, Any], status: str, tmp_path: Path) -> None:
    """In the first reset, which all ranks do, and in what the first rank does alone."""
    plan(tmp_path, "raise", **order)
    video = ["--trainer.callbacks+=qsm_lightning.callbacks.EvaluationVideo", "--trainer.callbacks.max_frames=20"]
    settings = [*FAULTY, "--checkpoint.every_frames=16", *(video if order.get("where") == "video" else [])]
    run = RankedRun(tmp_path, 2, *settings)
    began = time.monotonic()
    assert run.wait() == [3, 3], run.text
    assert time.monotonic() - began < 40
    said = [line for line in run.text.splitlines() if "(ValueError: the robot fell over)" in line]
    assert said
    assert all(status in line for line in said), run.text


@pytest.mark.parametrize("lost", [1, 2])
def test_only_the_lost_one_of_three_is_blamed(lost: int, tmp_path: Path) -> None:
    run = RankedRun(tmp_path, 3, *LONG, "--data.batch_size=9", "--checkpoint.every_frames=15")
    run.ranks[0].until(lambda: bool(_complete(tmp_path)))
    run.ranks[lost].signal(signal.SIGKILL)
    statuses = run.wait()
    assert statuses[0] == 3, run.text
    assert run.text.count("ended without a word") == 1, run.text
    assert f"rank {lost} ended without a word" in run.text


def test_a_rank_whose_end_shows_after_its_connections_broke_is_blamed() -> None:
    watch = Watch.__new__(Watch)
    watch.ranks = Ranks()
    watch.ranks.count = 2
    with subprocess.Popen(["sleep", "60"]) as other:
        watch._processes = [(socket.gethostname(), pid) for pid in (os.getpid(), other.pid)]
        assert watch._lost() == {}
        threading.Timer(0.3, other.kill).start()
        assert list(watch._lost()) == [1]


def test_a_damaged_checkpoint_is_passed_over_on_all_ranks(whole: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    run = run_of(again)
    (last(run).path / "state.ckpt").write_bytes(b"damaged")
    text = fit_ranks(again, 2, "--resume", run)
    assert text.count("going on from") == 1, text
    assert state(run)["OffPolicyDataModule"]["progress"]["frames"] == 96


def test_a_restarted_environment_of_one_rank_leaves_the_other_alone(tmp_path: Path) -> None:
    plan(tmp_path, "raise", 30, rank=1)
    text = fit_ranks(tmp_path, 2, *FAULTY, "--data.env_restarts=1")
    assert "built anew (1 of 1)" in text
    ranks = state(run_of(tmp_path))["OffPolicyDataModule"]["ranks"]
    assert [rank["progress"]["env_restarts"] for rank in ranks] == [0, 1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_ranks_learn_pendulum_as_one_does(tmp_path: Path) -> None:
    """At the same total frames; the shipped configuration ends above -250 on one process."""
    text = fit_ranks(tmp_path, 2, "--config=pendulum", timeout=1200)
    assert float(text.split("final return: ")[1].split()[0]) > -250, text


# Another number of processes.


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_goes_on_with_every_frame(before: int, after: int, tmp_path: Path) -> None:
    settings = [*TINY, "--data.total_frames=62", "--data.batch_size=12"]
    fit_ranks(tmp_path, before, *settings)
    run = run_of(tmp_path)
    stored = frames_of(frames_in(run))
    assert len(stored) == 62
    resume = ("--resume", run, "--data.total_frames=90")
    text = fit_ranks(tmp_path, after, *resume)
    assert text.count(f"the checkpoint is of {before} processes and goes on with {after}") == 1, text
    assert (f"Pendulum-v1 of rank {before} begins new episodes" in text) == (after > before), text
    parts = frames_in(run)
    assert len(parts) == after
    now = frames_of(parts)
    end = 92 if after == 3 else 90
    sizes = [len(part["action"]) for part in parts]
    assert len(now) == sum(sizes) == end, "a frame was doubled"
    both = torch.unique(torch.cat([stored, now]), dim=0)
    assert torch.equal(both, now), "a frame was lost"
    assert max(sizes) - min(sizes) <= 1
    steps = [step for step, _ in curves(run)["eval/return"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == end


@pytest.mark.parametrize("before", [1, 2, 5])
@pytest.mark.parametrize("after", [1, 2, 3, 7])
def test_frames_are_shared_out_without_loss(before: int, after: int, tmp_path: Path) -> None:
    """Rings that have wrapped, some of them in the middle of a file, and shares that do not come out even."""
    saved, kept = [], []
    for rank in range(before):
        buffer, archive = make_replay_buffer(23), ReplayArchive(tmp_path, rank)
        for part in range(3):
            buffer.extend(random_frames(11 + rank, 2, 1))
            if part != 1:
                archive.save(buffer)
        saved.append(
            {"replay": [astuple(chunk) for chunk in archive.chunks], "written": buffer.write_count, "capacity": 23}
        )
        kept.append(buffer[:].select("observation", "action", "next").to_dict())
    found = []
    for rank in range(after):
        pieces, most = part_of_frames(saved, tmp_path, _ranks(rank, after), 0)
        found.append(TensorDict.cat(list(pieces)).to_dict())
        assert len(found[-1]["action"]) in (most, most - 1)
    assert sum(len(part["action"]) for part in found) == 23 * before
    assert torch.equal(frames_of(found), frames_of(kept))


@pytest.mark.parametrize("after", [1, 3])
def test_frames_are_shared_out_oldest_first(after: int, tmp_path: Path) -> None:
    """Over all ranks, by when they were written: in this order the ring will lose them."""
    saved = []
    for rank in range(2):
        buffer, archive = make_replay_buffer(30), ReplayArchive(tmp_path, rank)
        for first in (0, 10, 20):
            buffer.extend(numbered(first, first + 10))
            archive.save(buffer)
        saved.append({"replay": [astuple(chunk) for chunk in archive.chunks], "written": 30, "capacity": 30})
    for rank in range(after):
        pieces, _ = part_of_frames(saved, tmp_path, _ranks(rank, after), 0)
        tens = [int(number // 10) for number in TensorDict.cat(list(pieces))["observation"]]
        assert tens == sorted(tens)


def test_updates_left_undone_are_cut_anew() -> None:
    whole = replay_batch(24).reshape(2, 12)
    saved = [
        {"owed": (whole[:, part].to_dict(), 2), "recent": asdict(RecentExperience()), "progress": asdict(Progress())}
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    parts = [adopt(saved, _ranks(rank, 2))["owed"] for rank in range(2)]
    assert [count for _, count in parts] == [2, 2]
    again = torch.cat([TensorDict(part, [2, 6]) for part, _ in parts], 1)
    assert (again == whole).all()


def test_counts_go_to_the_ranks_that_there_are() -> None:
    ranks = [
        {
            **{"owed": None, "envs": r, "generators": r, "sampler": r, "offline_sampler": r},
            "recent": {"returns": [float(r)], "lengths": [3], "frames": 5, "at_bounds": 0.5, "staleness": [r]},
        }
        for r in range(5)
    ]
    saved = [one | {"progress": {"frames": 50, "episodes": r, "env_restarts": r}} for r, one in enumerate(ranks)]
    now = [adopt(saved, _ranks(rank, 2)) for rank in range(2)]
    assert [one["progress"]["episodes"] for one in now] == [0 + 2 + 4, 1 + 3]
    assert [one["progress"]["env_restarts"] for one in now] == [4, 3], "each rank may have as many"
    assert [one["recent"]["returns"] for one in now] == [[0.0, 2.0, 4.0], [1.0, 3.0]]
    assert [one["recent"]["staleness"] for one in now] == [[0, 2, 4], [1, 3]]
    more = [adopt(saved, _ranks(rank, 7)) for rank in range(7)]
    assert [one["progress"]["episodes"] for one in more] == [0, 1, 2, 3, 4, 0, 0]
    for own in ("envs", "generators", "sampler", "offline_sampler"):
        assert [one[own] for one in more] == [0, 1, 2, 3, 4, None, None], "a new rank begins its own"


def _ranks(rank: int, count: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.count = rank, count
    return ranks


def test_one_process_evaluates_what_several_trained(whole: Path) -> None:
    run = Run(whole, last(run_of(whole)).path, "--episodes", 2, "--json", name="qsm-eval")
    assert run.wait() == 0, run.text
    assert '"frames": 96' in run.text
