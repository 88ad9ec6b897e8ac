"""A run's folder: one process uses it, its curves are cut back to where a run goes on, its settings stay its own."""

from __future__ import annotations

import csv
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from qsm_lightning import checkpoints, runs
from qsm_lightning.cli import build
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule
from tests.compare import curves, rows
from tests.helpers import SHRINK
from tests.processes import Run, fit, trained

TINY = [
    *("--config=pendulum", *SHRINK, "--data.eval_selector=sample", "--data.eval_episodes=1"),
    *("--model.loss.hidden=[8]", "--model.loss.T=2", "--picture.every_evaluations=0", "--metrics.every_frames=20"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 frames."""
    return trained(tmp_path_factory.mktemp("base"), *TINY)


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(base, copy)
    return copy


def refused(folder: Path, *args: object) -> str:
    text = fit(folder, *args, status=2)
    (sentence,) = [line for line in text.splitlines() if line.startswith("qsm-fit: ")]
    assert "Traceback" not in text
    return sentence


# One process.


def test_a_second_process_is_refused_in_one_sentence(run: Path, tmp_path: Path) -> None:
    first = Run(tmp_path, "--resume", run, "--data.total_frames=1000000", "--data.eval_every_frames=1000000")
    try:
        first.until(lambda: "replay buffer" in first.text)
        before = {path: path.read_bytes() for path in run.rglob("0*/*")}
        sentence = refused(tmp_path, "--resume", run, "--data.total_frames=65")
        assert sentence.startswith(f"qsm-fit: {run} is in use: another qsm-fit trains there; ")
        assert {path: path.read_bytes() for path in run.rglob("0*/*")} == before
        assert first.process.is_alive()
    finally:
        first.process.kill()
        first.wait()
    fit(tmp_path, "--resume", run, "--data.total_frames=65")  # held by a process, not by a file


def test_a_folder_is_held_until_it_is_let_go(tmp_path: Path) -> None:
    held = runs.lock(tmp_path)
    with pytest.raises(SettingError, match=f"^{tmp_path} is in use"):
        runs.lock(tmp_path)
    runs.lock(tmp_path / "another").close()
    held.close()
    runs.lock(tmp_path).close()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    runs.lock(tmp_path).close()


def test_taking_a_lock_changes_no_file(tmp_path: Path) -> None:
    """Where a run comes from somewhere else, the lock may be a link."""
    (tmp_path / "checkpoints").mkdir()
    target = tmp_path / "letter.txt"
    target.write_text("precious")
    (tmp_path / "checkpoints" / ".lock").symlink_to(target)
    runs.lock(tmp_path).close()
    assert target.read_text() == "precious"


# Curves as rows.

HEADER = "eval/return,loss/actor,step,train/buffer_size"
ROWS = [
    ",0.5,10,10",
    ",0.25,20,20",
    "-3.5,,20,",
    ",0.125,30,30",
    "-2.5,,40,",
    ",0.0625,40,40",
]


def written(folder: Path, text: str) -> list[str]:
    """The lines left of ``text`` at frame 20 with its evaluation done."""
    (folder / "metrics.csv").write_bytes(text.encode())
    runs.cut_curves(folder, 20, True)
    return (folder / "metrics.csv").read_text().splitlines()


@pytest.mark.parametrize(
    ("frames", "evaluated", "kept"),
    [
        (5, True, []),
        (10, True, [0]),
        (20, True, [0, 1, 2]),
        (20, False, [0, 1]),
        (25, False, [0, 1, 2]),
        (40, False, [0, 1, 2, 3, 5]),
        (40, True, [0, 1, 2, 3, 4, 5]),
        (100, False, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_rows_after_the_frame_are_cut(frames: int, evaluated: bool, kept: list[int], tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("\n".join([HEADER, *ROWS, ""]))
    for _ in range(2):  # the second time there is nothing left to do
        runs.cut_curves(tmp_path, frames, evaluated)
        assert path.read_text().splitlines() == [HEADER, *(ROWS[i] for i in kept)]


def test_a_torn_last_row_is_cut_wherever_it_ends(tmp_path: Path) -> None:
    whole = "\n".join([HEADER, *ROWS[:3], ""])
    last = "-2.5,0.0625,40,40\n"
    for end in range(len(last) + 1):
        assert written(tmp_path, whole + last[:end]) == [HEADER, *ROWS[:3]], last[:end]


HOLES = ["\0" * 512, "\0" * 200_000 + "\n", ",0.125,30,30\n" + "\0" * 100, "-2,1,4\0\0,30\n"]


@pytest.mark.parametrize("tail", [*HOLES, ",0.125,x,30\n", ",1,inf,30\n", "\n\n", '"', '"' + "\n1,2,3,4" * 30_000])
def test_a_spoilt_tail_is_cut(tail: str, tmp_path: Path) -> None:
    assert written(tmp_path, "\n".join([HEADER, *ROWS[:3], ""]) + tail) == [HEADER, *ROWS[:3]]


def test_a_table_without_a_column_of_frames_stops_nothing(tmp_path: Path) -> None:
    assert written(tmp_path, "a,b\n1,2\n")[0] == "a,b"


@pytest.mark.parametrize("text", ["", "\n", HEADER, f"{HEADER}\n"])
def test_a_table_without_rows_stays_one(text: str, tmp_path: Path) -> None:
    assert written(tmp_path, text) in ([], [""], [HEADER])


def test_no_curves_are_no_trouble(tmp_path: Path) -> None:
    runs.cut_curves(tmp_path, 10, True)
    assert list(tmp_path.iterdir()) == []


def test_values_with_commas_and_quotes_stay_as_they_are(tmp_path: Path) -> None:
    lines = written(tmp_path, 'step,"a, ""b"""\n20,"1, 2"\n30,3\n')
    assert list(csv.reader(lines)) == [["step", 'a, "b"'], ["20", "1, 2"]]


def test_frames_beyond_single_precision_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step\n1,16777216\n2,16777217\n3,16777218\n")
    runs.cut_curves(tmp_path, 16777217, True)
    assert path.read_text().split() == ["loss,step", "1,16777216", "2,16777217"]


# Curves as events.


def board(folder: Path, suffix: str = "") -> Path:
    """An event file with scalars, pictures and settings at frames 10, 20 and 30."""
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for frame in (10, 20, 30):
            writer.add_scalar("train/return", frame / 10, frame)
            writer.add_scalar("eval/return", -frame, frame)
            writer.add_scalar("eval_best_of_n/return", -frame, frame)
            writer.add_image("policy", torch.zeros(3, 2, 2), frame)
    return max(folder.glob("events.*"))


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), purge_orphaned_data=False, size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def steps(folder: Path) -> dict[str, list[int]]:
    events = read(folder)
    kinds = {"scalars": events.Scalars, "images": events.Images}
    return {tag: [event.step for event in get(tag)] for kind, get in kinds.items() for tag in events.Tags()[kind]}


@pytest.mark.parametrize("frames", [10, 20, 25, 30])
def test_events_after_the_frame_are_cut(frames: int, tmp_path: Path) -> None:
    board(tmp_path)
    kept = [frame for frame in (10, 20, 30) if frame <= frames]
    for _ in range(2):
        runs.cut_curves(tmp_path, frames, True)
        assert steps(tmp_path) == dict.fromkeys(
            ["train/return", "eval/return", "eval_best_of_n/return", "policy"], kept
        )
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file is left"


def test_what_an_evaluation_that_is_done_again_wrote_is_cut(tmp_path: Path) -> None:
    """Its returns and its picture would stand there twice; what training wrote at that frame stays."""
    board(tmp_path)
    runs.cut_curves(tmp_path, 20, False)
    assert steps(tmp_path) == {
        "train/return": [10, 20],
        **dict.fromkeys(["eval/return", "eval_best_of_n/return", "policy"], [10]),
    }


def test_pictures_and_values_stay_bit_by_bit(tmp_path: Path) -> None:
    board(tmp_path)
    before = read(tmp_path)
    runs.cut_curves(tmp_path, 20, True)
    after = read(tmp_path)
    assert after.Images("policy") == before.Images("policy")[:2]
    assert after.Scalars("train/return") == before.Scalars("train/return")[:2]


def test_all_event_files_are_cut(tmp_path: Path) -> None:
    """A run that was resumed before has several."""
    paths = {board(tmp_path, suffix) for suffix in (".a", ".b")}
    assert len(paths) == 2
    runs.cut_curves(tmp_path, 10, True)
    assert steps(tmp_path)["train/return"] == [10, 10]


def test_settings_of_a_run_stay_on_its_board(tmp_path: Path) -> None:
    """As they do wherever they were written: TensorBoard shows a run's settings once."""
    logger = TensorBoardLogger(tmp_path, "name", "version", default_hp_metric=False)
    logger.log_hyperparams({"m_q": 3.0}, {"score": 1.0})
    logger.log_metrics({"train/return": 1.0}, 30)
    for summary in hparams({"m_q": 3.0}, {"score": 1.0}):
        logger.experiment._get_file_writer().add_summary(summary, 30)
    logger.save()
    logger.experiment.close()
    (path,) = tmp_path.glob("name/version/events.*")
    tags = ["_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"]
    assert [path.read_bytes().count(tag.encode()) for tag in tags] == [2, 2, 2]
    runs.cut_curves(path.parent, 10, True)
    assert [path.read_bytes().count(tag.encode()) for tag in tags] == [2, 2, 2]
    assert "train/return" not in read(path.parent).Tags()["scalars"]


def test_a_torn_event_file_keeps_all_whole_records(tmp_path: Path) -> None:
    content = board(tmp_path).read_bytes()
    (path,) = tmp_path.iterdir()
    ends = [*range(len(content) - 60, len(content)), 0, 1, 11, 12, 100]
    for end in ends:
        path.write_bytes(content[:end])
        runs.cut_curves(tmp_path, 20, True)
        if end > len(content) - 60:
            assert steps(tmp_path)["policy"] == [10, 20], end
        assert len(path.read_bytes()) <= end


@pytest.mark.parametrize("tail", [b"\0" * 512, b"garbage" * 100, b"\xff" * 12])
def test_an_event_file_with_a_spoilt_tail_keeps_all_whole_records(tail: bytes, tmp_path: Path) -> None:
    path = board(tmp_path)
    path.write_bytes(path.read_bytes() + tail)
    runs.cut_curves(tmp_path, 20, True)
    assert steps(tmp_path)["train/return"] == [10, 20]
    runs.cut_curves(tmp_path, 20, True)
    assert steps(tmp_path)["train/return"] == [10, 20]


def test_a_file_that_holds_no_events_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"this is not an event file, and long enough for a header")
    runs.cut_curves(tmp_path, 20, True)


# What to type.


def test_a_run_with_its_settings_is_resumed_by_its_folder(run: Path) -> None:
    assert runs.resume_command(run / "checkpoints" / "000000060") == f"qsm-fit --resume {run}"


def test_a_run_that_names_code_of_ones_own_is_resumed_with_trust(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("env: Pendulum-v1", "env: mine:Pendulum-v1"))
    assert runs.resume_command(run / "checkpoints" / "000000060") == f"qsm-fit --resume {run} --trust"


def test_without_settings_in_its_folder_they_have_to_be_given(tmp_path: Path) -> None:
    checkpoint = tmp_path / "a run" / "checkpoints" / "000000060"
    command = runs.resume_command(checkpoint)
    assert shlex.split(command) == ["qsm-fit", "--config", "CONFIG", "--ckpt_path", str(checkpoint)]


def test_a_folder_with_a_space_is_quoted(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "a run")
    command = runs.resume_command(tmp_path / "a run" / "checkpoints" / "000000060")
    assert shlex.split(command) == ["qsm-fit", "--resume", str(tmp_path / "a run")]
    fit(tmp_path, *shlex.split(command)[1:], "--data.total_frames=65")


def test_a_run_is_resumed_from_within_its_folder(run: Path) -> None:
    text = fit(run, "--resume", ".", "--data.total_frames=65")
    assert text.splitlines()[0].endswith(" from frame 60")
    assert {path.name for path in run.parent.iterdir()} == {"run"}
    assert len(list(run.glob("events.*"))) == 2


def test_a_shipped_configuration_is_found_from_within_a_run(run: Path) -> None:
    fit(run, *TINY, "--ckpt_path", "checkpoints/000000060", "--data.total_frames=65")
    assert (run / "checkpoints" / "000000065").is_dir()


@pytest.mark.parametrize("args", [["--resume", "."], ["--config", "../../config.yaml", "--ckpt_path", "state.ckpt"]])
def test_a_run_is_resumed_from_within_its_checkpoint(args: list[str], run: Path) -> None:
    fit(run / "checkpoints" / "000000060", *args, "--data.total_frames=65")
    assert (run / "checkpoints" / "000000065").is_dir()


# Settings that may and may not change.

CHANGES: dict[str, tuple[str, str, str]] = {  # option: value there, here, and as it is typed
    "model.loss.m_q": ("'auto'", "3.0", "3"),
    "model.loss.hidden": ("[8]", "[8, 8]", "[8,8]"),
    "model.loss.score_at": ("'denoised'", "'noisy'", "noisy"),
    "model.critic_lr": ("0.0003", "0.001", "1e-3"),
    "model.actor_lr_decay_updates": ("2000000", "0", "0"),
    "data.utd": ("1.0", "0.5", "0.5"),
    "data.num_envs": ("1", "2", "2"),
    "data.batch_size": ("8", "16", "16"),
    "data.buffer_size": ("1000", "500", "500"),
    "data.init_random_frames": ("40", "30", "30"),
    "seed_everything": ("0", "5", "5"),
    "trainer.precision": ("'32-true'", "'64-true'", "64"),
    "trainer.gradient_clip_val": ("None", "1.0", "1.0"),
    "trainer.gradient_clip_algorithm": ("None", "'value'", "value"),
    "model.ema": ("None", "0.9", "0.9"),
}


def differences(sentence: str) -> dict[str, str]:
    """{setting: 'X there, Y here'} of the sentence that refuses."""
    listed = sentence.split("was made with other settings: ")[1].split("; go on with its own")[0]
    parts = [part.rstrip(")").partition(" (") for part in listed.split("), ")]
    return {name: values for name, _, values in parts}


@pytest.mark.parametrize("names", [["model.loss.m_q"], ["seed_everything"], list(CHANGES)], ids=["m_q", "seed", "all"])
def test_settings_that_make_a_run_what_it_is_are_refused_all_at_once(
    names: list[str], run: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = [f"--{name}={CHANGES[name][2]}" for name in names]
    sentence = refused(tmp_path, "--resume", run, "--data.total_frames=65", *options)
    expected = {name: f"{CHANGES[name][0]} there, {CHANGES[name][1]} here" for name in names}
    assert differences(sentence) == expected
    assert f"{run / 'checkpoints' / '000000060'} was made with" in sentence
    assert f"qsm-fit --resume {run})" in sentence
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_curve_stays_that_of_one_selector(run: Path, tmp_path: Path) -> None:
    fit(tmp_path, "--resume", run, "--data.total_frames=65", "--data.eval_selector=both", "--data.eval_candidates=3")
    best = ["--data.eval_selector=best_of_n", "--data.eval_candidates=4"]
    sentence = refused(tmp_path, "--resume", run, "--data.total_frames=70", *best)
    assert differences(sentence) == {
        "data.eval_selector": "'sample' there, 'best_of_n' here",
        "data.eval_candidates": "3 there, 4 here",
    }


def test_another_environment_is_refused(run: Path, tmp_path: Path) -> None:
    sentence = refused(tmp_path, "--resume", run, "--data.env=MountainCarContinuous-v0", "--data.total_frames=65")
    assert differences(sentence)["data.env"] == "'Pendulum-v1' there, 'MountainCarContinuous-v0' here"


class Other(QSM):
    """A loss with a setting of its own."""

    def __init__(self, observation_dim: int, action_dim: int, extra: float = 1.0, **settings: Any) -> None:
        super().__init__(observation_dim, action_dim, **settings)


def test_another_loss_is_refused_with_what_only_one_has(run: Path, tmp_path: Path) -> None:
    sentence = refused(tmp_path, "--resume", run, "--model.loss=tests.test_runs.Other", "--data.total_frames=65")
    assert "model.loss ('qsm_lightning.losses.QSM' there, 'tests.test_runs.Other' here)" in sentence
    assert "model.loss.extra (only here)" in sentence


def test_settings_that_only_watch_may_change(run: Path, tmp_path: Path) -> None:
    changes = {
        "data.eval_every_frames": 20,
        "data.eval_episodes": 2,
        "data.eval_selector": "both",
        "data.eval_candidates": 3,
        "data.storage": "memmap",
        "data.total_frames": 90,
        "metrics.every_frames": 7,
        "checkpoint.keep_last": 5,
        "checkpoint.every_frames": 13,
    }
    fit(tmp_path, "--resume", run, *(f"--{name}={value}" for name, value in changes.items()))
    evaluated = [step for step, _ in curves(run)["eval/return"]]
    assert evaluated == [60, 80, 90]
    assert [step for step, _ in curves(run)["eval_best_of_n/return"]] == [80, 90]
    logged = [float(row["step"]) for row in rows(run) if "lr/actor" in row]
    assert logged[:3] == [20, 40, 60]
    assert logged[-1] == 90
    assert {two - one for one, two in pairwise(logged[3:-1])} == {7}
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert {name: settings[group][key] for name in changes for group, key in [name.split(".")]} == changes
    fit(tmp_path, "--resume", run, "--data.total_frames=95")


@pytest.mark.parametrize(("frames", "status"), [(60, 2), (50, 2), (61, 0)])
def test_a_finished_run_goes_on_with_more_frames_only(frames: int, status: int, run: Path, tmp_path: Path) -> None:
    text = fit(tmp_path, "--resume", run, f"--data.total_frames={frames}", status=status)
    if status:
        sentence = f"data.total_frames is {frames}: {run / 'checkpoints' / '000000060'} is already at 60 frames"
        assert sentence in text
    else:
        assert "from frame 60" in text


@pytest.fixture
def longer(run: Path, tmp_path: Path) -> Path:
    """A run of 90 frames with checkpoints at 60 and 90."""
    fit(tmp_path, "--resume", run, "--data.total_frames=90")
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--trainer.callbacks+=LearningRateMonitor", "--trainer.logger=false"], 2),
        (["--trainer.fast_dev_run=true"], 0),
    ],
    ids=["refused", "fast_dev_run"],
)
def test_a_resume_that_does_not_train_leaves_the_run_as_it_was(
    args: list[str], status: int, longer: Path, tmp_path: Path
) -> None:
    before = content(longer)
    text = fit(tmp_path, "--resume", longer / "checkpoints" / "000000060", *args, status=status)
    assert "Traceback" not in text
    assert content(longer) == before
    fit(tmp_path, "--resume", longer / "checkpoints" / "000000060", "--data.total_frames=90")
    assert (longer / "checkpoints" / "000000090.aside").is_dir()


def test_a_run_stays_in_its_folder_whatever_logs_it(run: Path, tmp_path: Path) -> None:
    fit(tmp_path, "--resume", run, "--data.total_frames=90", "--trainer.logger=false")
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["total_frames"] == 90
    assert not (tmp_path / "runs").exists()


class Odd(Callback):
    """Its state is no plain data."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": np.datetime64("2026-01-01")}


def test_a_state_that_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    text = fit(tmp_path, *TINY, "--trainer.callbacks+=tests.test_runs.Odd", status=2)
    assert "qsm-fit: trainer.callbacks: the state of Odd is not plain data" in text
    assert "Traceback" not in text


def test_a_progress_bar_of_ones_own_stands_in_place_of_ours(tmp_path: Path) -> None:
    assert "Epoch 0" in fit(tmp_path, *TINY, "--trainer.callbacks+=TQDMProgressBar")


def test_a_folder_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = build([*TINY, "--trainer.default_root_dir=~/all"]).trainer.loggers[1].root_dir
    assert folder == str(tmp_path / "home/all/Pendulum-v1")
    assert build([*TINY, "--trainer.default_root_dir=$HOME/all"]).trainer.loggers[0].root_dir == folder


def test_lightning_loads_a_checkpoint_by_itself(run: Path) -> None:
    path = run / "checkpoints" / "000000060" / "state.ckpt"
    module = OffPolicyModule.load_from_checkpoint(path)
    weights = checkpoints.load(path)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert module.updates == 20
    assert OffPolicyDataModule.load_from_checkpoint(path).total_frames == 60


def test_a_run_in_place_of_a_checkpoint_is_told_the_other_option(run: Path, tmp_path: Path) -> None:
    sentence = refused(tmp_path, *TINY, "--ckpt_path", run)
    assert sentence.startswith(f"qsm-fit: --ckpt_path: {run} is a run's folder; go on with the run by --resume {run}")
    sentence = refused(tmp_path, *TINY, "--ckpt_path", run / "config.yaml")
    assert sentence.startswith(f"qsm-fit: --ckpt_path: {run / 'config.yaml'} is not a checkpoint that a run can go on")


def test_a_run_without_a_checkpoint_is_told_how_to_begin_anew(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    sentence = refused(tmp_path, "--resume", run)
    assert sentence.endswith(f"that run left no checkpoint; begin it anew by --config {run / 'config.yaml'}")


def test_a_run_without_its_settings_is_not_resumed_by_its_folder(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").unlink()
    sentence = refused(tmp_path, "--resume", run)
    assert sentence.startswith(f"qsm-fit: --resume is {str(run)!r}: there is no {run / 'config.yaml'}")
    fit(tmp_path, *TINY, "--ckpt_path", run / "checkpoints" / "000000060", "--data.total_frames=65")
    assert (run / "config.yaml").is_file(), "the run went on in its own folder"
