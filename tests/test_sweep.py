"""qsm-sweep: what it runs, how it goes on, what it refuses."""

from __future__ import annotations

import errno
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest
import yaml
from rich.console import Console

from qsm_lightning import launching, runs
from qsm_lightning.commands import sweep
from qsm_lightning.commands.sweep import plan, seeds_of, variants_of
from qsm_lightning.errors import SettingError, TrainingFault
from tests import faulty_envs
from tests.compare import assert_same
from tests.helpers import SHRINK
from tests.processes import Run, fit

TINY = [
    *("--config=pendulum", *SHRINK, "--model.compile=false", "--picture.every_evaluations=0"),
    *("--data.eval_selector=sample", "--data.eval_episodes=1"),
]


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0-4", [0, 1, 2, 3, 4]), ("7,0-2", [7, 0, 1, 2]), ("3-3", [3])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert seeds_of(text) == seeds


def test_every_combination_of_what_varies() -> None:
    vary = ["model.loss=qsm,sac", "--model.loss.hidden=[8,8],[16]", "config=dmc/walker_walk"]
    found = variants_of(vary, [])
    assert list(found) == [
        f"loss={loss},hidden={hidden},config=dmc-walker_walk" for loss in ("qsm", "sac") for hidden in ("[8,8]", "[16]")
    ]
    assert found["loss=sac,hidden=[8,8],config=dmc-walker_walk"] == [
        "--model.loss=sac",
        "--model.loss.hidden=[8,8]",
        "--config=dmc/walker_walk",
    ]
    named = variants_of(["data.utd=1,0.5"], ["fixed=", "auto=--model.loss.m_q auto"])
    assert list(named) == ["fixed,utd=1", "fixed,utd=0.5", "auto,utd=1", "auto,utd=0.5"]
    assert named["auto,utd=0.5"] == ["--data.utd=0.5", "--model.loss.m_q", "auto"]
    on_top = variants_of(["config=hopper"], ["sac=--config algo/sac"])
    assert on_top == {"sac,config=hopper": ["--config=hopper", "--config", "algo/sac"]}
    assert variants_of([], []) == {"": []}


def test_the_plan_has_each_seed_of_all_before_the_next(tmp_path: Path) -> None:
    jobs, at_once, out = plan([*TINY, "--vary", "model.loss=qsm,td3", "--seeds=0-1", "--jobs=3", f"--out={tmp_path}"])
    assert [job.label for job in jobs] == ["loss=qsm/seed=0", "loss=td3/seed=0", "loss=qsm/seed=1", "loss=td3/seed=1"]
    assert (at_once, out) == (3, tmp_path)
    assert (jobs[0].total_frames, jobs[0].folder) == (60, tmp_path / "loss=qsm" / "seed=0")
    assert not any(tmp_path.iterdir()), "planning writes nothing"


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--seeds=4-0"], "--seeds is '4-0'"),
        (["--seeds=0,0"], "--seeds.*twice"),
        (["--seeds=0-999999999"], "--seeds.*at most"),
        (["--seeds=a"], "--seeds is 'a'"),
        (["--seeds=5000000000"], "--seeds is 5000000000: it must be from 0 to 4294967295"),
        ([f"--seeds={'9' * 5000}"], "--seeds is '9+': write"),
        (["--jobs=0"], "--jobs is 0"),
        (["--vary=model.loss"], "--vary is 'model.loss': write KEY=A,B"),
        (["--vary=model.ema=,0.9"], "--vary is 'model.ema=,0.9': write KEY=A,B.* and null for no value"),
        (["--vary=model.actor_lr=[1e-4,3e-4"], "write KEY=A,B.* one pair of brackets"),
        (["--vary=model.loss.hidden=[[8],[9]]"], "write KEY=A,B.* one pair of brackets"),
        (["--vary=model.loss.T=5,6", "--vary=model.loss.T=7"], "'T=5,T=7' and 'T=6,T=7' are the same settings"),
        (["--vary=model.loss.T=5,6", "--variant=x=--model.loss.T 7"], "'x,T=5' and 'x,T=6' are the same settings"),
        (["--vary=model.actor_lr=3e-4,0.0003"], "are the same settings"),
        (["--data.buffer_size=1000000000000"], "data.buffer_size is 10+: that needs a tensor"),
        (["--vary=model.loss=sac,sac"], "two variants have the name 'loss=sac'"),
        (["--variant==x"], "--variant is '=x'"),
        (["--vary=model.loss=sac,sax"], "no such loss"),
        (["--vary=data.utd=1,-1"], "data.utd is -1"),
        (["--name=mine"], "--name is the same in all runs of qsm-sweep, or set by it"),
        (["--seed_everything", "3"], "--seed_everything is the same"),
        (["--vary=seed_everything=0,1"], "--seed_everything is the same"),
        (["--variant=a=--trainer.logger false"], "--trainer.logger is the same"),
        (["--config=file"], "trainer.logger is set by qsm-sweep: leave it out of --config"),
        (["--variant=..=--data.utd 1"], "begins with no point"),
        (['--variant=a=--data.utd "1'], "mend the quotes"),
        (["--vary=model.loss=qsm,dacer", "--model.compile=true"], "model.compile is true"),
        (["--data.env=Hoper-v5"], "Hoper-v5.*did you mean Hopper-v5"),
        (["--out=file"], "--out is .*file cannot be written"),
    ],
)
def test_what_is_refused_before_anything_runs(
    args: list[str], pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("trainer: {logger: false}")
    with pytest.raises(SettingError, match=pattern):
        plan([*TINY, *args])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_sweep_goes_on_to_what_it_would_have_been(tmp_path: Path) -> None:
    """Two runs at a time; a signal in the middle; the same command; the states are those of runs of their own."""
    args = [*TINY, "--seeds=0-1", "--out=all", "--data.total_frames=120", "--checkpoint.every_frames=10"]
    first = Run(tmp_path, *args, "--jobs=2", name="qsm-sweep")
    one = tmp_path / "all/seed=0/version_0/checkpoints"
    first.until(lambda: one.is_dir() and any(one.glob("0*")), timeout=120)
    first.signal(signal.SIGTERM)
    assert first.wait() == 143, first.text
    assert "seed=1: running" in first.text, "side by side"
    assert "the same command goes on" in first.text
    assert "Traceback" not in first.text
    second = Run(tmp_path, *args, "--jobs=2", name="qsm-sweep")
    assert second.wait(240) == 0, second.text
    assert "seed=0: complete 120/120 return" in second.text
    assert "next: qsm-report all" in second.text
    for seed in (0, 1):
        fit(tmp_path, *TINY, "--data.total_frames=120", "--checkpoint.every_frames=10", f"--seed_everything={seed}")
        assert_same(tmp_path / f"all/seed={seed}/version_0", tmp_path / f"runs/Pendulum-v1/version_{seed}")
    jobs, *_ = plan([*args, f"--out={tmp_path / 'all'}"])
    assert {job.state for job in jobs} == {"complete"}
    other = Run(tmp_path, *args, "--model.loss=sac", name="qsm-sweep")
    assert other.wait() == 2
    assert "--out: " in other.text
    assert re.search(r"was made with other settings: .*model\.loss \(", other.text)
    assert len(list((tmp_path / "all").glob("*/version_*"))) == 2


@pytest.mark.slow
def test_a_torn_checkpoint_is_passed_over_as_the_run_does(tmp_path: Path) -> None:
    args = [*TINY, "--out=all", "--checkpoint.every_frames=20", "--checkpoint.keep_last=3"]
    first = Run(tmp_path, *args, name="qsm-sweep")
    assert first.wait(240) == 0, first.text
    folder = tmp_path / "all/seed=0/version_0/checkpoints"
    newest = max(folder.glob("0*"))
    (newest / "state.ckpt").write_bytes((newest / "state.ckpt").read_bytes()[:1000])
    second = Run(tmp_path, *args, name="qsm-sweep")
    assert second.wait(240) == 0, second.text
    assert "seed=0: complete 60/60" in second.text
    log = (tmp_path / "all/seed=0/log.txt").read_text()
    assert f"{newest.name}/state.ckpt has 1000 bytes" in log
    for state in folder.glob("0*/state.ckpt"):
        state.unlink()
    with pytest.raises(SettingError, match=r"--out: .*state.ckpt is missing.*or choose another --out"):
        plan([*TINY, f"--out={tmp_path / 'all'}"])


def test_runs_of_a_sweep_that_is_killed_save_and_end(tmp_path: Path) -> None:
    args = [*TINY, "--out=all", "--data.total_frames=100000", "--data.eval_every_frames=100000"]
    run = Run(tmp_path, *args, "--checkpoint.every_frames=100000", "--metrics.every_frames=10", name="qsm-sweep")
    log = tmp_path / "all/seed=0/log.txt"
    run.until((log.parent / "version_0/metrics.csv").is_file, timeout=300)  # it trains
    run.signal(signal.SIGKILL)
    assert run.wait() == 128 + signal.SIGKILL
    end = time.monotonic() + 60
    while "interrupted by SIGTERM" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    assert len(list((tmp_path / "all/seed=0/version_0/checkpoints").glob("0*"))) == 1


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 2, ["0", "1"]), ("3,5,7", 3, ["3", "5", "7"]), ("3,9", 1, ["3"]), ("", 0, []), (None, 0, [])],
)
def test_the_gpus_there_are(visible: str | None, count: int, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launching.gpus() == names


def test_gpus_are_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs side by side have a GPU each, in turn; a run that chooses its devices sees all."""
    jobs, *_ = plan([*TINY, "--variant=one=", "--variant=own=--trainer.devices 1", "--seeds=0-1", f"--out={tmp_path}"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    says = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    monkeypatch.setattr(sweep, "command", lambda _: says)
    sweep.Sweep(jobs, 2).run()
    seen = {job.label: job.log.read_text().strip() for job in jobs}
    assert sorted(seen.pop(f"one/seed={seed}") for seed in (0, 1)) == ["3", "5"]
    assert set(seen.values()) == {"3,5"}


def test_a_hang_up_that_nohup_ignores_stays_ignored() -> None:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for signum in before:  # these tests may run in the background, where SIGINT is ignored
            signal.signal(signum, signal.SIG_IGN if signum == signal.SIGHUP else signal.SIG_DFL)
        running = sweep.Sweep([], 1)
        running.run()
        seen = {signum: signal.getsignal(signum) for signum in before}
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert seen.pop(signal.SIGHUP) is signal.SIG_IGN
    assert set(seen.values()) == {running._interrupt}


def test_a_sweep_whose_lines_nobody_reads_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sweep, "command", lambda _: [sys.executable, "-c", "import time; time.sleep(300)"])
    jobs = [sweep.Job(f"seed={i}", tmp_path / str(i), [], 60) for i in range(3)]

    def unread(view: sweep.View) -> None:
        if jobs[0].process is not None:
            raise BrokenPipeError

    monkeypatch.setattr(sweep.View, "show", unread)
    with pytest.raises(BrokenPipeError):
        sweep.Sweep(jobs, 1).run()
    assert [job.state for job in jobs] == ["interrupted", "waiting", "waiting"]


def test_a_full_disk_costs_a_sweep_its_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sweep, "command", lambda _: [sys.executable, "-c", ""])
    jobs = [sweep.Job(f"seed={i}", tmp_path / str(i), [], 0) for i in range(2)]

    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    sweep.Sweep(jobs, 1).run()
    assert [job.state for job in jobs] == ["complete", "complete"]


def test_a_run_whose_sweep_was_gone_before_it_began_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, *TINY, "--data.total_frames=10000000", env={launching.SWEEP: str(2**22 + 1)})
    assert run.wait(120) == 128 + signal.SIGTERM, run.text


def test_the_table_of_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons stand there as they are; where lines are few, the runs that run or failed are the ones to be seen."""
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    jobs = [sweep.Job(f"hidden=[8,8]/seed={i}", tmp_path, [], 60) for i in range(40)]
    for job in jobs[:20]:
        job.state = "complete"
    jobs[25].state, jobs[30].state = "running", "failed ([/pytorch/gloo/pair.cc:534] refused; 'qsm-lightning[modes]')"

    def shown(height: int) -> str:
        view = sweep.View(jobs)
        view.console = Console(file=io.StringIO(), width=120, height=height)
        view.console.print(view._table())
        return cast(io.StringIO, view.console.file).getvalue()

    assert all(f"hidden=[8,8]/seed={i} " in shown(50) for i in range(40))
    few = shown(20)
    assert "seed=25" in few
    assert "[/pytorch/gloo/pair.cc:534] refused; 'qsm-lightning[modes]'" in few
    assert re.search("20 runs +complete.*18 runs +waiting", few, re.DOTALL)
    assert len(few.splitlines()) == 5


def test_a_run_that_cannot_begin_is_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (job,), *_ = plan([*TINY, f"--out={tmp_path}"])
    job.log.mkdir(parents=True)
    with pytest.raises(TrainingFault, match="1 of 1 runs failed"):
        sweep.Sweep([job], 1).run()
    assert job.state.startswith("failed ([Errno 21] Is a directory")


def test_a_run_that_another_sweep_trains_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (job,), *_ = plan([*TINY, f"--out={tmp_path}"])
    job.folder.mkdir()
    with job.log.open("a") as log, subprocess.Popen(["sleep", "60"], stdout=log) as theirs:
        assert runs.hold(log)
        log.close()  # the process holds it still
        with pytest.raises(TrainingFault, match="1 of 1 runs failed"):
            sweep.Sweep([job], 1).run()
        theirs.kill()
    assert job.state == "failed (another qsm-sweep trains it: wait for its end)"
    assert not list(job.folder.glob("version_*"))


@pytest.mark.parametrize(
    ("status", "said", "why"),
    [
        (-9, "qsm-fit: all/seed=0/version_0\nframes 10/60", "ended by signal 9, Killed"),
        (1, "qsm-fit: all/seed=0/version_0\nTraceback\nTypeError: no", "TypeError: no"),
        (1, "", "status 1"),
        (2, "qsm-fit: data.utd is -1: give another\n", "data.utd is -1: give another"),
        (3, "qsm-fit: all\nqsm-fit: diverged; the last checkpoint is x\nresume with: y", "diverged; the last .* x"),
    ],
)
def test_why_a_run_failed(status: int, said: str, why: str, tmp_path: Path) -> None:
    job = sweep.Job("seed=0", tmp_path, [], 60)
    job.log.write_text("before\n" + said)
    assert re.fullmatch(rf"failed \({why}\)", sweep._why(job, len("before\n"), status, None))


def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    """Its reason stands in its line and the sweep's status is 3; the same command then completes it."""
    args = [*TINY, f"--data.env={faulty_envs.NAME}", "--seeds=0-1", "--out=all", "--jobs=1", "--trust"]
    faulty_envs.plan(tmp_path, "raise", 50)
    first = Run(tmp_path, *args, name="qsm-sweep")
    assert first.wait(240) == 3, first.text
    assert "seed=0: failed (" in first.text
    assert "seed=1: complete 60/60" in first.text
    assert "qsm-sweep: 1 of 2 runs failed; see all/seed=0/log.txt" in first.text
    second = Run(tmp_path, *args, name="qsm-sweep")
    assert second.wait(240) == 0, second.text
    assert "seed=0: complete 60/60" in second.text


def test_settings_reach_every_run(tmp_path: Path) -> None:
    done = Run(tmp_path, *TINY, "--variant=small=--model.actor_lr 0.001 --data.utd 0.5", "--seeds=3", name="qsm-sweep")
    assert done.wait(240) == 0, done.text
    (run,) = tmp_path.glob("sweeps/pendulum/small/seed=3/version_0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"]["actor_lr"], config["data"]["utd"], config["seed_everything"]) == (0.001, 0.5, 3)
    manifest = json.loads(next(run.glob("checkpoints/0*/manifest.json")).read_text())
    assert manifest["frames"] == 60
    again = plan(
        [*TINY, "--variant=small=--model.actor_lr 0.001 --data.utd 0.5", "--seeds=3", f"--out={run.parents[2]}"]
    )
    (job,), *_ = again
    assert job.state == "complete"
    assert f"--ckpt_path={run}/checkpoints/000000060" in sweep.command(job)


def test_a_run_goes_on_with_what_its_configuration_now_says(tmp_path: Path) -> None:
    """First it is stopped early by a limit of its own, which is no failure; then it is to be longer."""
    config = tmp_path / "mine.yaml"
    args = ["--config=mine.yaml", *TINY[1:], "--data.env=Pendulum-v1", "--out=all", "--checkpoint.every_frames=10"]
    args = [arg for arg in args if "total_frames" not in arg]
    config.write_text("data: {total_frames: 90}")
    first = Run(tmp_path, *args, "--trainer.max_epochs=1", name="qsm-sweep")
    assert first.wait(240) == 0, first.text
    assert "seed=0: stopped early 60/90" in first.text
    assert "the same command, with a greater limit, goes on" in first.text
    config.write_text("data: {total_frames: 120}")
    second = Run(tmp_path, *args, name="qsm-sweep")
    assert second.wait(240) == 0, second.text
    assert "seed=0: complete 120/120" in second.text
    assert len(list((tmp_path / "all/seed=0").glob("version_*"))) == 1
