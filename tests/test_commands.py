"""What a user does, in real processes: train, look, evaluate, repeat, resume, interrupt, meet a fault."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsm_lightning import checkpoints
from qsm_lightning.cli import fit as fit_main
from qsm_lightning.commands import collect, evaluate, export, modes, report, sweep
from qsm_lightning.commands.base import run_command
from tests.compare import last
from tests.conftest import Command
from tests.helpers import SHRINK, environment, needs_dmc
from tests.processes import fit

GPU = torch.cuda.is_available()
TINY = ["--config", "pendulum", *SHRINK, "--metrics.every_frames=10"]


def run_folder(tmp_path: Path, version: int = 0) -> Path:
    return next(tmp_path.glob(f"runs/*/version_{version}"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(last(run).state, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tiny run of Pendulum, two evaluations long, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    result = subprocess.run(
        [Path(sys.executable).with_name("qsm-fit"), *TINY, "--data.eval_every_frames=30", "--seed_everything=5"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return folder, result.stdout


def test_a_run_prints_where_everything_is(trained: tuple[Path, str]) -> None:
    folder, out = trained
    end = out.strip().splitlines()[-5:]
    assert re.fullmatch(r"final return: -?\d+\.\d\d", end[0])
    assert re.fullmatch(r"best return: -?\d+\.\d\d", end[1])
    assert "replay buffer: 60 frames, 1.99 KiB in memory, up to 1.99 KiB in runs/Pendulum-v1/version_0" in out
    assert "compiling" not in out
    run = run_folder(folder)
    relative = run.relative_to(folder)
    assert str(relative) == "runs/Pendulum-v1/version_0"
    assert end[2] in (
        f"checkpoints: {relative}/checkpoints/000000060",
        f"checkpoints: {relative}/checkpoints/000000030, {relative}/checkpoints/000000060",
    )
    assert end[3].endswith(f"qsm-eval {relative}")
    assert "frames 60/60 return" in out


def test_a_run_leaves_config_checkpoints_metrics_and_events(trained: tuple[Path, str]) -> None:
    run = run_folder(trained[0])
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"000000030", "000000060", "replay", ".lock"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["seed_everything"] == 5
    assert config["data"]["total_frames"] == 60
    assert config["model"]["loss"]["init_args"]["hidden"] == [16, 16]
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    returns = {int(float(row["step"])): float(row["eval/return"]) for row in rows if row["eval/return"]}
    assert list(returns) == [30, 60], "the x-axis is frames"
    assert all(row["eval_best_of_n/return"] for row in rows if row["eval/return"])
    updates = {int(float(row["step"])): float(row["train/updates"]) for row in rows if row["train/updates"]}
    assert updates == {10: 0, 20: 0, 30: 0, 40: 0, 50: 10, 60: 20}


def test_tensorboard_has_every_promised_curve(trained: tuple[Path, str]) -> None:
    events = EventAccumulator(str(run_folder(trained[0])))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    expected = {f"eval/{k}" for k in ("return", "return_std", "length")}
    expected |= {f"eval_best_of_n/{k}" for k in ("return", "return_std", "length")}
    expected |= {"loss/qvalue", "loss/actor", "lr/qvalue", "lr/actor", "speed/frames_per_s", "speed/updates_per_s"}
    expected |= {f"update/{k}" for k in ("q_mean", "q_std", "q_disagreement", "q_grad_norm", "eps_norm")}
    expected |= {"train/actions_at_bounds", "train/buffer_size"}
    assert expected <= scalars, expected - scalars
    assert "policy" in events.Tags()["images"]
    assert [event.step for event in events.Scalars("eval/return")] == [30, 60]


def test_training_return_and_length_are_logged_when_episodes_end(quick_command: Command, tmp_path: Path) -> None:
    result = quick_command("qsm-fit", *TINY, "--data.env=tests.fake_envs:Clock-v0")
    assert result.returncode == 0, result.stderr
    with (run_folder(tmp_path) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/return"]]
    assert {float(row["train/length"]) for row in rows} == {5.0}
    assert float(rows[-1]["train/episodes"]) == 12


def test_qsm_eval_needs_nothing_repeated(trained: tuple[Path, str], quick_command: Command) -> None:
    run = run_folder(trained[0])
    plain = quick_command("qsm-eval", run, "--episodes", 3)
    assert plain.returncode == 0, plain.stderr
    for key in ("mean", "std", "min", "max", "length"):
        assert re.search(rf"^{key}: -?\d+\.\d\d$", plain.stdout, re.M)
    best = checkpoints.best(run / "checkpoints")
    assert best is not None
    results = [
        json.loads(quick_command("qsm-eval", target, "--episodes", 3, "--json", *more).stdout)
        for target, more in (
            (run, []),
            (best.path, []),
            (run, ["--selector", "best_of_n", "--candidates", 8]),
            (run, ["--seed", 1]),
        )
    ]
    assert (
        results[0]["mean"]
        == results[1]["mean"]
        == pytest.approx(float(plain.stdout.split("mean: ")[1].split()[0]), abs=0.01)
    )
    assert results[0]["env"] == "Pendulum-v1"
    assert results[0]["episodes"] == 3
    assert results[0]["length"] == 200
    assert results[0]["min"] <= results[0]["mean"] <= results[0]["max"]
    assert results[2]["mean"] != results[0]["mean"] != results[3]["mean"]


def test_qsm_eval_records_a_video(trained: tuple[Path, str], command: Command, tmp_path: Path) -> None:
    result = command("qsm-eval", run_folder(trained[0]), "--episodes", 1, "--video", "out.gif")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.gif").read_bytes().startswith(b"GIF8")


def test_a_runs_configuration_repeats_it_bitwise(
    trained: tuple[Path, str], quick_command: Command, tmp_path: Path
) -> None:
    run = run_folder(trained[0])
    result = quick_command("qsm-fit", "--config", run / "config.yaml")
    assert result.returncode == 0, result.stderr
    ours, theirs = weights(run), weights(run_folder(tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    result = quick_command("qsm-fit", "--config", run / "config.yaml", "--seed_everything", 6)
    other = weights(run_folder(tmp_path, 1))
    assert not all(torch.equal(ours[key], other[key]) for key in ours)


@pytest.mark.parametrize("env", ["Hopper-v5", pytest.param("dmc:cartpole/swingup", marks=needs_dmc)])
def test_a_seed_decides_a_run_with_parallel_environments(env: str, quick_command: Command, tmp_path: Path) -> None:
    args = [*TINY, f"--data.env={env}", "--data.num_envs=2", "--data.eval_selector=sample", "--name=twice"]
    for _ in range(2):
        assert quick_command("qsm-fit", *args).returncode == 0
    first, second = (weights(tmp_path / "runs" / "twice" / f"version_{v}") for v in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_last_means_the_newest_run_of_that_name(
    trained: tuple[Path, str], quick_command: Command, tmp_path: Path
) -> None:
    """With a configuration of the user's own the newest run goes on; with a run's, that run."""
    shutil.copytree(trained[0] / "runs", tmp_path / "runs")
    assert quick_command("qsm-fit", *TINY, "--data.eval_every_frames=30", "--seed_everything=5").returncode == 0
    settings = [*TINY, "--data.eval_every_frames=30", "--seed_everything=5", "--data.total_frames=70"]
    result = quick_command("qsm-fit", *settings, "--ckpt_path", "last")
    assert result.returncode == 0, result.stderr
    assert last(run_folder(tmp_path, 1)).order[0] == 70
    assert last(run_folder(tmp_path, 0)).order[0] == 60
    first = run_folder(tmp_path, 0) / "config.yaml"
    result = quick_command("qsm-fit", "--config", first, "--ckpt_path", "last", "--data.total_frames=80")
    assert result.returncode == 0, result.stderr
    assert last(run_folder(tmp_path, 0)).order[0] == 80
    assert not (tmp_path / "runs" / "Pendulum-v1" / "version_2").exists()


@contextmanager
def training(tmp_path: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """qsm-fit as a process that has begun to write metrics."""
    process = subprocess.Popen(
        [Path(sys.executable).with_name("qsm-fit"), *args],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/version_0/metrics.csv")) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield process
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("signum", "status", "compile"),
    [(signal.SIGINT, 130, "false"), pytest.param(signal.SIGTERM, 143, "auto", marks=pytest.mark.slow)],
)
def test_a_signal_leaves_a_checkpoint(signum: signal.Signals, status: int, compile: str, tmp_path: Path) -> None:
    args = [*TINY, "--data.total_frames=1000000", "--data.eval_every_frames=1000000", f"--model.compile={compile}"]
    with training(tmp_path, *args) as process:
        time.sleep(1)
        process.send_signal(signum)
        out, err = process.communicate(timeout=300)  # the first update is being compiled
    assert process.returncode == status, err
    assert ("compiling the update: a minute or so the first time" in out) == (compile == "auto")
    run = run_folder(tmp_path).relative_to(tmp_path)
    checkpoint = last(tmp_path / run)
    assert f"{run}/checkpoints/{checkpoint.path.name}" in err
    assert "Traceback" not in err
    assert checkpoint.order[0] > 0
    assert f"resume with: qsm-fit --resume {run}\n" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.critic_lr=1e30"], "training diverged: loss/"),
        (["--model.actor_lr=1e30"], "training diverged: loss/m_q"),
        (
            ["--model.actor_lr=1e30", "--model.loss.score_at=noisy", "--data.eval_every_frames=41"],
            "the policy's action is NaN or infinite",
        ),
        pytest.param(
            ["--data.env=dmc:cartpole/swingup", "--model.actor_lr=1e30", "--model.loss.score_at=noisy"],
            "the policy's action is NaN or infinite",
            marks=needs_dmc,
        ),
    ],
)
def test_a_fault_stops_training_and_names_the_last_good_checkpoint(
    args: list[str], words: str, quick_command: Command, tmp_path: Path
) -> None:
    result = quick_command("qsm-fit", *TINY, "--data.eval_every_frames=42", *args)
    assert result.returncode == 3, result.stderr
    sentence = result.stderr.strip().splitlines()[-1]
    assert words in sentence
    assert "Traceback" not in result.stderr
    found = checkpoints.complete(run_folder(tmp_path) / "checkpoints")
    assert ("the last good checkpoint is" in sentence) == bool(found)
    if found:
        assert [checkpoint.order for checkpoint in found] == [(42, 0)]
        assert all(value.isfinite().all() for value in weights(run_folder(tmp_path)).values())


def test_a_fault_after_a_resume_names_the_checkpoint_it_came_from(tmp_path: Path) -> None:
    """Rewards that overflow the critics: the one it went on from is the last good one."""
    settings = [*TINY, "--data.env=tests.fake_envs:Overflow-v0"]
    fit(tmp_path, *settings)
    checkpoint = last(run_folder(tmp_path))
    out = fit(tmp_path, *settings, "--data.total_frames=500", "--ckpt_path", checkpoint.path, "--trust", status=3)
    assert "training diverged: loss/qvalue" in out
    assert f"the last good checkpoint is {checkpoint.path}" in out
    assert last(run_folder(tmp_path)) == checkpoint


def test_help_and_print_config_read_well(command: Command) -> None:
    text = command("qsm-fit", "--help").stdout
    for setting in ("--data.env", "--data.total_frames", "--model.critic_lr", "--ckpt_path", "--metrics.every_frames"):
        assert setting in text
    assert "gradient updates per frame" in text
    for line in ("qsm-fit --config conf/hopper.yaml", "--model.loss.m_q 50.0", "--model.loss.hidden [512, 512]"):
        assert re.search(rf"^ *{re.escape(line)}$", text, re.M), line
    assert "M_q, the inverse temperature" in text
    printed = command("qsm-fit", "--config", "dmc/quadruped_walk", "--data.num_envs", 2, "--print_config")
    config = yaml.safe_load(printed.stdout)
    assert config["data"]["env"] == "dmc:quadruped/walk"
    assert config["data"]["num_envs"] == 2
    assert config["model"]["loss"]["init_args"]["m_q"] == "auto"
    assert "target_entropy" in command("qsm-fit", "--model.loss.help", "sac").stdout
    assert "--episodes" in command("qsm-eval", "--help").stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "precision",
    [
        *("32-true", "64-true", "bf16-mixed"),
        pytest.param("16-mixed", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="there is no GPU")]),
    ],
)
def test_the_shipped_pendulum_run_learns(precision: str, command: Command) -> None:
    """The README's first command, in every precision: from about -1200 to better than -250."""
    result = command("qsm-fit", "--config", "pendulum", "--trainer.precision", precision, timeout=1800)
    assert result.returncode == 0, result.stderr
    first = float(re.search(r"return (-?[\d.]+)", result.stdout)[1])  # type: ignore[index]
    final = float(re.search(r"final return: (-?[\d.]+)", result.stdout)[1])  # type: ignore[index]
    assert first < -900
    assert final > -250


LEARN_PENDULUM: dict[str, list[str]] = {
    "dacer": [
        *("--model.loss.alpha_every=1000", "--model.loss.hidden=[128,128]"),  # the entropy is estimated six times
        "--data.total_frames=7500",
    ],
    "diffusion_ql": ["--model.loss.hidden=[128,128]", "--data.total_frames=7500", "--model.compile=true"],
    "sac": [],
    "sdac": [
        *("--model.loss.entropy_coef=1", "--model.loss.reverse_samples=8", "--model.loss.hidden=[128,128]"),
        *("--data.total_frames=7500", "--model.compile=true"),
    ],
    "td3": [],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("loss", [*LEARN_PENDULUM])
def test_other_algorithms_learn_pendulum(loss: str, command: Command) -> None:
    """With the settings of the shipped Pendulum run, and what is fitted to it."""
    fitted = LEARN_PENDULUM[loss]
    settings = ["--config", "pendulum", "--config", f"algo/{loss}", "--data.eval_selector=sample", *fitted]
    result = command("qsm-fit", *settings, timeout=1800)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"best return: (-?[\d.]+)", result.stdout)[1]) > -300  # type: ignore[index]


def test_an_evaluation_video_is_switched_on_from_the_command_line(quick_command: Command, tmp_path: Path) -> None:
    video = "--trainer.callbacks+=qsm_lightning.callbacks.EvaluationVideo"
    result = quick_command("qsm-fit", *TINY, "--data.eval_every_frames=30", video, "--trainer.callbacks.max_frames=20")
    assert result.returncode == 0, result.stderr
    run = run_folder(tmp_path)
    assert sorted(path.name for path in (run / "videos").iterdir()) == ["000000030.gif", "000000060.gif"]
    events = EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Images("episode")] == [30, 60]


@pytest.mark.parametrize(
    "extra",
    [
        ["--trainer.logger=false"],
        ["--trainer.enable_checkpointing=false"],
        ["--trainer.enable_progress_bar=false"],
        ["--trainer.max_epochs=1", "--data.eval_every_frames=30"],
        ["--trainer.fast_dev_run=true"],
        ["--trainer.num_sanity_val_steps=1"],
        ["--trainer.default_root_dir=null"],
        ["--data.utd=0.01"],
        ["--data.storage=memmap", "--data.utd=0.5", "--data.num_envs=3", "--data.frames_per_batch=6"],
    ],
    ids=" ".join,
)
def test_trainer_flags_that_change_what_is_written(extra: list[str], quick_command: Command) -> None:
    result = quick_command("qsm-fit", *TINY, *extra)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "final return: " in result.stdout


EARLY = {
    "max_steps": (["--trainer.max_steps=5"], "trainer.max_steps"),
    "max_epochs": (["--trainer.max_epochs=1"], "trainer.max_epochs"),
    "max_time": (
        ["--trainer.max_time=00:00:00:01", "--data.total_frames=1000000", "--data.eval_every_frames=1000000"],
        "trainer.max_time",
    ),
    "EarlyStopping": (
        [
            "--trainer.callbacks+=EarlyStopping",
            "--trainer.callbacks.monitor=eval/length",
            "--trainer.callbacks.patience=1",
        ],
        "EarlyStopping on eval/length",
    ),
}


@pytest.mark.parametrize("limit", EARLY)
def test_what_ended_a_run_early_is_told_again_as_long_as_it_does(limit: str, quick_command: Command) -> None:
    extra, name = EARLY[limit]
    args = [*TINY, "--data.eval_every_frames=10", *extra]
    first = quick_command("qsm-fit", *args)
    assert first.returncode == 0, first.stderr
    frame, of = re.findall(rf"^stopped early, at frame (\d+) of (\d+), by {name}$", first.stdout, re.MULTILINE)[0]
    assert int(frame) < int(of)
    (folder,) = re.findall(r"^next: qsm-eval (.*)$", first.stdout, re.MULTILINE)
    if limit in ("max_steps", "max_epochs"):
        again = quick_command("qsm-fit", "--resume", folder)
        assert again.returncode == 0, again.stderr
        assert f"stopped early, at frame {frame} of {of}, by {name}\ncheckpoints: " in again.stdout
        assert "checkpoints: none" not in again.stdout


def test_a_run_without_a_folder_of_its_own_does_not_touch_anothers(quick_command: Command, tmp_path: Path) -> None:
    """Without loggers checkpoints lie in the root itself."""
    settings = [*TINY, "--trainer.logger=false"]
    assert quick_command("qsm-fit", *settings).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("checkpoints" in str(path) for path in before)
    result = quick_command("qsm-fit", *settings, "--seed_everything=3", "--data.total_frames=50")
    assert result.returncode == 2
    assert "those of another run do already; choose another" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    longer = quick_command("qsm-fit", *settings, "--ckpt_path=runs/checkpoints/000000060", "--data.total_frames=70")
    assert longer.returncode == 0, longer.stderr


def test_two_processes_by_a_trainer_flag(command: Command) -> None:
    result = command("qsm-fit", *TINY, "--trainer.accelerator=cpu", "--trainer.devices=2")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.count("final return: ") == 1


def test_an_interrupted_evaluation_ends_with_its_checkpoint_and_a_second_ctrl_c_at_once(tmp_path: Path) -> None:
    args = [*TINY, "--data.eval_every_frames=42", "--data.eval_episodes=60", "--data.total_frames=100000"]
    with training(tmp_path, *args) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Ctrl-C again to stop at once" in err
    assert "interrupted by SIGINT" in err
    assert "Traceback" not in err


def test_a_mapped_buffers_folder_serves_one_run_after_another(quick_command: Command, tmp_path: Path) -> None:
    for _ in range(2):
        result = quick_command("qsm-fit", *TINY, "--data.storage=memmap", "--data.storage_dir=frames")
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "frames").is_dir()
    assert not list((tmp_path / "frames").iterdir())


def test_evaluating_more_often_does_not_change_training(
    trained: tuple[Path, str], command: Command, tmp_path: Path
) -> None:
    result = command(
        "qsm-fit", *TINY, "--seed_everything=5", "--data.eval_every_frames=20", "--data.eval_selector=best_of_n"
    )
    assert result.returncode == 0, result.stderr
    ours, theirs = weights(run_folder(tmp_path)), weights(run_folder(trained[0]))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_terminal_gets_one_bar_over_all_frames(tmp_path: Path) -> None:
    main, side = pty.openpty()
    process = subprocess.Popen(
        [Path(sys.executable).with_name("qsm-fit"), *TINY, "--data.eval_every_frames=30"],
        cwd=tmp_path,
        env=environment() | {"TERM": "xterm", "COLUMNS": "150"},
        stdout=side,
        stderr=subprocess.DEVNULL,
    )
    os.close(side)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    bars = [line for line in re.split(r"[\r\n]+", text) if line.startswith("Frames")]
    assert "60/60" in bars[-1]
    for word in ("return:", "frames/s:", "updates/s:", "left:"):
        assert word in bars[-1]
    assert "Epoch" not in text
    assert "final return: " in text


@pytest.mark.parametrize("errors", [subprocess.PIPE, subprocess.STDOUT], ids=["output", "both"])
def test_output_on_a_full_disk(errors: int, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [Path(sys.executable).with_name("qsm-fit"), *TINY],
            cwd=tmp_path,
            env=environment(),
            stdout=full,
            stderr=errors,
            text=True,
        )
    assert process.returncode == 3, process.stderr
    if errors == subprocess.STDOUT:
        return
    assert process.stderr.rstrip().endswith(
        "qsm-fit: what it writes finds no place (No space left on device): free some disk"
    )
    assert "Traceback" not in process.stderr


def test_a_full_disk_costs_a_run_its_lines_alone(tmp_path: Path) -> None:
    """Those of progress and, after a signal, the one that it stops: the checkpoint is there."""
    long = ["--data.total_frames=10000000", "--data.eval_every_frames=30", "--model.compile=false"]
    code = (
        "import sys; from qsm_lightning import cli; from qsm_lightning.callbacks import FrameProgress, StopOnSignal\n"
        "for cls, name in ((FrameProgress, '_print_line'), (StopOnSignal, '_stop')):\n"
        "    def full(*args, inner=getattr(cls, name)):\n"
        "        out, err = sys.stdout, sys.stderr\n"
        "        sys.stdout = sys.stderr = open('/dev/full', 'w', buffering=1)\n"
        "        try: inner(*args)\n"
        "        finally: sys.stdout, sys.stderr = out, err\n"
        "    setattr(cls, name, full)\n"
        "cli.fit(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *TINY, *long],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("runs/*/*/checkpoints/0*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "the run's last state is in" in said


def test_output_that_is_closed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    run_command("qsm-eval", lambda: print("nowhere"))


LONG = "a" * 300


@pytest.mark.parametrize(
    ("main", "args"),
    [
        *((command.main, [LONG]) for command in (evaluate, export, modes, report)),
        (collect.main, [LONG, "--frames=5", "--out=file.npz"]),
        *((fit_main, ["--config=pendulum", f"--data.dataset={LONG}{end}"]) for end in ("", ".npz", "/x")),
        (fit_main, ["--resume", LONG]),
        (sweep.main, [f"--config={LONG}", "--out=runs"]),
    ],
)
def test_a_name_that_is_too_long_is_a_sentence(
    main: Any, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("' cannot be looked at (File name too long): choose another\n")


@pytest.mark.parametrize("training", [False, True], ids=["from the start", "while it trains"])
def test_output_that_nobody_reads_any_more(training: bool, tmp_path: Path) -> None:
    """As into ``head``: a sentence and no traceback, and a run keeps its checkpoints."""
    long = ["--data.total_frames=10000", "--data.eval_every_frames=50", "--model.compile=false"]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("qsm-fit"), *TINY, *(long if training else ["--print_config"])],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    while training and "return" not in process.stdout.readline():
        pass
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGPIPE, said
    assert said.rstrip().endswith("qsm-fit: what it prints is no longer read")
    assert "Traceback" not in said
    if training:
        last(run_folder(tmp_path))
