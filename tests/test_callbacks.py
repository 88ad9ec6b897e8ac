"""Callbacks, with small stand-ins for the trainer."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from qsm_lightning import callbacks as cb
from qsm_lightning.callbacks.policy_picture import draw_policy
from qsm_lightning.collect import Progress, RecentExperience
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.envs import make_render_env
from qsm_lightning.errors import Interrupted, SettingError, TrainingFault
from qsm_lightning.losses import QSM
from qsm_lightning.recording import check_video_path, picture_strip, record_episode, write_video
from tests.helpers import needs_dmc, needs_gl

SMALL = partial(QSM, hidden=(8,), time_dim=4, T=2)


def stand_in(frames: int = 0, **settings: Any) -> Mock:
    """A trainer whose datamodule is at ``frames``."""
    data = Mock(spec=OffPolicyDataModule)
    data.progress = Progress(frames)
    data.total_frames = 10_000
    data.configure_mock(**settings)
    return Mock(datamodule=data, loggers=[Mock()], is_global_zero=True, sanity_checking=False, fast_dev_run=False)


def test_a_diverged_loss_stops_with_its_name_and_frame() -> None:
    guard, trainer = cb.StopOnNonFinite(), stand_in(1234)
    guard.on_train_batch_end(trainer, Mock(metrics={}), None, None, 0)
    guard.on_train_batch_end(trainer, Mock(metrics={"loss/qvalue": torch.tensor(1e30)}), None, None, 0)
    metrics = {"loss/qvalue": torch.tensor(1.0), "loss/actor": torch.tensor(float("nan"))}
    with pytest.raises(TrainingFault, match="loss/actor is nan at frame 1234"):
        guard.on_train_batch_end(trainer, Mock(metrics=metrics), None, None, 0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_batch_and_handlers_come_back(signum: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(signum)
    callback, writer, trainer = cb.CheckpointOnSignal(), cb.RunCheckpoint(), stand_in(7)
    trainer.loggers, trainer.checkpoint_callbacks = [SimpleNamespace(log_dir=str(tmp_path))], [writer]
    writer.setup(trainer, Mock(), "fit")
    callback.setup(trainer, Mock(), "fit")
    callback.on_train_start(trainer, Mock())
    callback.on_train_batch_end(trainer, Mock(), None, None, 0)
    trainer.save_checkpoint.assert_not_called()
    signal.raise_signal(signum)
    with pytest.raises(Interrupted) as stop:
        callback.on_train_batch_end(trainer, Mock(), None, None, 0)
    assert stop.value.signum == signum
    trainer.save_checkpoint.assert_called_once_with(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    callback.on_exception(trainer, Mock(), stop.value)
    assert signal.getsignal(signum) is before


def test_a_second_ctrl_c_does_not_wait() -> None:
    callback = cb.CheckpointOnSignal()
    callback.setup(Mock(), Mock(), "fit")
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted, match="nothing was saved"):
        signal.raise_signal(signal.SIGINT)
    callback.teardown(Mock(), Mock(), "fit")


def test_last_and_best_follow_the_evaluations(tmp_path: Path) -> None:
    """Also when no optimizer steps in between, and over a resume into another folder."""

    def trainer_in(folder: Path) -> Mock:
        trainer = stand_in()
        trainer.loggers = [SimpleNamespace(log_dir=str(folder))]

        def save(path: Path, weights_only: bool) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{trainer.callback_metrics['eval/return'].item():.0f}")

        trainer.save_checkpoint.side_effect = save
        return trainer

    def evaluate(writer: cb.RunCheckpoint, trainer: Mock, score: float) -> tuple[str, str]:
        trainer.callback_metrics = {"eval/return": torch.tensor(score)}
        trainer.datamodule.progress.frames += 10
        writer.on_validation_end(trainer, Mock())
        assert writer.last is not None
        return writer.last.read_text(), writer.last.with_name("best.ckpt").read_text()

    writer, trainer = cb.RunCheckpoint(), trainer_in(tmp_path / "a")
    writer.setup(trainer, Mock(), "fit")
    assert [evaluate(writer, trainer, s) for s in (-5, -9, -1, -3)] == [
        ("-5", "-5"),
        ("-9", "-5"),
        ("-1", "-1"),
        ("-3", "-1"),
    ]
    calls = trainer.save_checkpoint.call_count
    writer.on_train_end(trainer, Mock())
    assert trainer.save_checkpoint.call_count == calls, "nothing new to save"
    resumed, trainer = cb.RunCheckpoint(), trainer_in(tmp_path / "b")
    resumed.setup(trainer, Mock(), "fit")
    resumed.load_state_dict(writer.state_dict())
    resumed.on_train_start(trainer, Mock())
    assert (tmp_path / "b" / "checkpoints" / "best.ckpt").read_text() == "-1"
    assert evaluate(resumed, trainer, -2) == ("-2", "-1")
    assert evaluate(resumed, trainer, 0) == ("0", "0")


def test_metrics_are_written_every_so_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 10.0, 110.0, 110.0])
    monkeypatch.setattr("qsm_lightning.callbacks.metrics.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    recent = RecentExperience([3.0, 5.0], [10, 20], frames=100, at_bounds=25.0)
    trainer = stand_in(0, buffer=[0] * 7, take_recent=Mock(return_value=recent))
    trainer.optimizers = [Mock(param_groups=[{"lr": 0.1}]), Mock(param_groups=[{"lr": 0.2}])]
    module = Mock(metrics={"loss/qvalue": torch.tensor(2.5)}, loss=SimpleNamespace(terms=("qvalue", "actor")))
    callback = cb.TrainingMetrics(every_frames=100)
    callback.on_train_start(trainer, module)
    progress = trainer.datamodule.progress
    for progress.frames in range(1, 100):
        callback.on_train_batch_end(trainer, module, None, None, 0)
    trainer.loggers[0].log_metrics.assert_not_called()
    progress.frames, progress.updates, progress.episodes = 100, 50, 2
    callback.on_train_batch_end(trainer, module, None, None, 0)
    (metrics,), at = trainer.loggers[0].log_metrics.call_args
    assert at == {"step": 100}
    assert metrics == {
        "train/return": 4.0,
        "train/length": 15.0,
        "train/actions_at_bounds": 0.25,
        "train/buffer_size": 7,
        "train/episodes": 2,
        "train/updates": 50,
        "speed/frames_per_s": 10.0,
        "speed/updates_per_s": 5.0,
        "loss/qvalue": 2.5,
        "lr/qvalue": 0.1,
        "lr/actor": 0.2,
    }


@pytest.mark.parametrize("action_dim", [1, 2, 4])
def test_the_picture_has_a_panel_per_state_and_pair(action_dim: int) -> None:
    torch.manual_seed(0)
    loss = SMALL(3, action_dim)
    states, before = torch.randn(3, 3), torch.get_rng_state()
    figure = draw_policy(loss, states, samples=50)
    assert torch.equal(before, torch.get_rng_state())
    panels = [axes for axes in figure.axes if axes.get_title().startswith("state")]
    assert len(panels) == 3 * max(1, action_dim - 1)
    assert all(p.grad is None for p in loss.parameters())
    if action_dim > 1:  # what the colours show is the critics' mean with the other components at the samples' mean
        points = np.asarray(panels[0].collections[-1].get_offsets())
        assert 1 <= len(points) <= 50
        assert np.abs(points).max() <= 1


def test_the_picture_is_written_to_tensorboard_with_frames_as_the_step(tmp_path: Path) -> None:
    loss = SMALL(3, 1)
    logger = TensorBoardLogger(str(tmp_path))
    buffer = {"observation": torch.randn(100, 3)}
    data_buffer = Mock(
        __len__=lambda self: 100, __getitem__=lambda self, rows: {"observation": buffer["observation"][rows]}
    )
    trainer = stand_in(500, buffer=data_buffer)
    trainer.loggers = [logger]
    add = Mock()
    logger.experiment.add_figure = add  # type: ignore[method-assign]
    callback = cb.PolicyPicture(every_evaluations=2, states=2, samples=10)
    for _ in range(4):
        callback.on_validation_end(trainer, Mock(loss=loss))
    assert [call.args[0] for call in add.call_args_list] == ["policy"] * 2
    assert add.call_args.args[2] == 500
    restored = cb.PolicyPicture(every_evaluations=2)
    restored.load_state_dict(callback.state_dict())
    assert torch.equal(restored._observations, callback._observations)  # type: ignore[arg-type]
    assert cb.PolicyPicture(0).on_validation_end(trainer, Mock(loss=loss)) is None


def test_a_strip_shows_frames_in_order() -> None:
    frames = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 320, 240, 3), np.uint8)
    strip = picture_strip(frames, count=5, height=160)
    assert strip.shape == (160, 5 * 120, 3)
    assert strip[0, ::120, 0].tolist() == [0, 25, 50, 74, 99]


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_videos_are_files_that_play(suffix: str, tmp_path: Path) -> None:
    import imageio.v3 as iio

    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    frames = np.random.default_rng(0).integers(0, 255, (12, 65, 64, 3), dtype=np.uint8)
    path = str(tmp_path / "deep" / f"episode{suffix}")
    write_video(path, frames)
    back = iio.imread(path, index=None) if suffix == ".gif" else np.stack(list(iio.imiter(path)))
    assert len(back) == 12
    with pytest.raises(SettingError, match=r"\.mp4 or \.gif"):
        check_video_path("episode.avi")


@pytest.mark.parametrize(
    "name",
    [
        "Pendulum-v1",
        pytest.param("Hopper-v5", marks=needs_gl),
        pytest.param("dmc:cartpole/swingup", marks=[needs_gl, needs_dmc]),
    ],
)
def test_an_episode_is_recorded(name: str) -> None:
    env, _ = make_render_env(name)
    loss = SMALL(env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1])
    before = torch.get_rng_state()
    frames, episode_return = record_episode(name, loss.evaluation_policy(), 1, 2, max_frames=12, every=4)
    assert torch.equal(before, torch.get_rng_state())
    assert 1 <= len(frames) <= 3
    assert frames.dtype == np.uint8
    assert frames[0].std() > 0, "the picture is empty"
    again, same_return = record_episode(name, loss.evaluation_policy(), 1, 2, max_frames=12, every=4)
    assert np.array_equal(frames, again)
    assert episode_return == same_return


@pytest.mark.parametrize("fault", [RuntimeError("no GL context"), None])
def test_rendering_that_fails_is_said_before_training(fault: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    render = Mock(side_effect=fault, return_value=None)
    monkeypatch.setattr("qsm_lightning.recording.make_render_env", lambda name: (Mock(), render))
    with pytest.raises(SettingError, match="no GL context.*MUJOCO_GL=egl" if fault else "no rgb_array"):
        cb.EvaluationVideo().setup(stand_in(env_name="Hopper-v5"), Mock(), "fit")


def test_envpool_is_not_rendered() -> None:
    with pytest.raises(SettingError, match="cannot be rendered"):
        make_render_env("envpool:Hopper-v5")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cb.TrainingMetrics(0), "metrics.every_frames"),
        (lambda: cb.PolicyPicture(-1), "picture.every_evaluations"),
        (lambda: cb.PolicyPicture(states=0), "picture.states"),
        (lambda: cb.EvaluationVideo(0), "every_evaluations"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make()
