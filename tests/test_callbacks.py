"""Callbacks, with small stand-ins for the trainer."""

from __future__ import annotations

import errno
import math
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from benchmarks import policy_picture
from pytorch_lightning.loggers import TensorBoardLogger

from qsm_lightning import callbacks as cb
from qsm_lightning.callbacks.policy_picture import draw_policy
from qsm_lightning.checkpoints import complete
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.distributed import Ranks
from qsm_lightning.envs import make_render_env
from qsm_lightning.errors import Interrupted, SettingError, TrainingFault
from qsm_lightning.losses import QSM
from qsm_lightning.progress import Progress, RecentExperience
from qsm_lightning.recording import check_video_path, picture_strip, record_episode, write_video
from qsm_lightning.stopping import Stopping
from tests.helpers import SHRINK, needs_dmc, needs_gl
from tests.processes import trained

SMALL = partial(QSM, hidden=(8,), time_dim=4, T=2)


def stand_in(frames: int = 0, **settings: Any) -> Mock:
    """A trainer whose datamodule is at ``frames``."""
    data = Mock(spec=OffPolicyDataModule)
    data.progress = Progress(frames)
    data.total_frames = 10_000
    data.ranks = Ranks()
    data.stopping = Stopping(data.ranks)
    data.configure_mock(**settings)
    return Mock(
        datamodule=data,
        loggers=[Mock()],
        is_global_zero=True,
        sanity_checking=False,
        fast_dev_run=False,
        scaler=None,
    )


def test_a_diverged_loss_stops_with_its_name_and_frame() -> None:
    guard, trainer = cb.StopOnNonFinite(), stand_in(1234)
    guard.on_train_batch_end(trainer, Mock(metrics={}), None, None, 0)
    guard.on_train_batch_end(trainer, Mock(metrics={"loss/qvalue": torch.tensor(1e30)}), None, None, 0)
    metrics = {"loss/qvalue": torch.tensor(1.0), "loss/actor": torch.tensor(float("nan"))}
    with pytest.raises(TrainingFault, match="loss/actor is nan at frame 1234"):
        guard.on_train_batch_end(trainer, Mock(metrics=metrics), None, None, 0)


@pytest.mark.parametrize(("value", "at_once", "saves"), [(1.0, False, 1), (math.nan, False, 0), (1.0, True, 0)])
def test_a_signal_saves_unless_training_diverged(value: float, at_once: bool, saves: int, tmp_path: Path) -> None:
    """Between two looks of the guard an update may have gone wrong. A second signal stops at once, without a save."""
    run, writer = Writing(tmp_path, 5), cb.RunCheckpoint()
    run.trainer.datamodule.started = True
    writer.on_train_start(run.trainer, Mock())
    module = Mock(metrics={"loss/qvalue": torch.tensor(2.0), "loss/actor": torch.tensor(value)})
    with pytest.warns(UserWarning, match="training diverged .loss/actor") if math.isnan(value) else nullcontext():
        writer.on_exception(run.trainer, module, Interrupted(signal.SIGINT, at_once=at_once))
    assert len(complete(run.folder)) == saves


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_handlers_come_back(signum: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    callback, trainer = cb.StopOnSignal(), stand_in(7)
    callback.setup(trainer, Mock(), "fit")
    callback.on_train_start(trainer, Mock())
    signal.raise_signal(signal.SIGUSR1)
    assert trainer.datamodule.stopping.save_wanted
    assert trainer.datamodule.stopping.signal is None
    signal.raise_signal(signum)
    assert trainer.datamodule.stopping.signal == signum
    signal.raise_signal(signal.SIGTERM)  # again, from an impatient scheduler: the checkpoint is under way
    with pytest.raises(Interrupted) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.value.at_once
    callback.teardown(trainer, Mock(), "fit")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


class Writing:
    """A trainer that a RunCheckpoint can save, in ``folder``."""

    def __init__(self, folder: Path, frames: int = 0) -> None:
        self.trainer = stand_in(frames, evaluation_owed=False)
        self.trainer.loggers = []
        self.trainer.ckpt_path = None
        self.trainer.datamodule.run = folder
        self.trainer.datamodule.save_replay.return_value = {}
        self.write = self.trainer.strategy.save_checkpoint
        self.write.side_effect = lambda state, path: path.write_text("state")
        self.folder = folder / "checkpoints"

    def evaluate(self, writer: cb.RunCheckpoint, score: float) -> list[str]:
        self.trainer.callback_metrics = {"eval/return": torch.tensor(score)}
        self.trainer.datamodule.progress.frames += 10
        writer.on_validation_end(self.trainer, Mock())
        return [checkpoint.path.name.lstrip("0") for checkpoint in complete(self.folder)]

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Within it nothing can be written."""
        good = self.write.side_effect
        self.write.side_effect = OSError(errno.ENOSPC, "No space left on device")
        yield
        self.write.side_effect = good


def training(folder: Path, **settings: Any) -> tuple[cb.RunCheckpoint, Writing]:
    """A RunCheckpoint of a run that has begun to train."""
    writer, run = cb.RunCheckpoint(**settings), Writing(folder)
    writer.on_train_start(run.trainer, Mock())
    return writer, run


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    """Also when no optimizer steps in between."""
    writer, run = training(tmp_path, keep_last=2)
    kept = [run.evaluate(writer, score) for score in (-5, -9, -7, -1, -3, -3, -8)]
    assert kept == [
        ["10"],
        ["10", "20"],
        ["10", "20", "30"],
        ["30", "40"],
        ["40", "50"],
        ["40", "50", "60"],
        ["40", "60", "70"],
    ]
    assert writer.best_return == -1
    assert writer.best is not None
    assert writer.best.order == (40, 0)
    calls = run.write.call_count
    writer.on_train_end(run.trainer, Mock())
    assert run.write.call_count == calls, "nothing new to save"


def test_checkpoints_between_evaluations(tmp_path: Path) -> None:
    writer, run = training(tmp_path, every_frames=30, keep_last=9)
    progress = run.trainer.datamodule.progress
    for progress.frames in range(7, 100, 7):
        run.trainer.datamodule.evaluation_owed = progress.frames == 35  # it will be saved after that evaluation
        writer.on_train_batch_end(run.trainer, Mock(), None, None, 0)
    assert [checkpoint.order[0] for checkpoint in complete(run.folder)] == [42, 63, 91]


def test_a_full_disk_costs_a_warning_and_another_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one stays, nothing half-written is left, and the next attempt does not wait for an evaluation."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("qsm_lightning.callbacks.checkpoint.time", clock)
    writer, run = training(tmp_path)
    run.evaluate(writer, -1)
    sentence = "No space left on device.*the last one is .*000000010.*trying again"
    with run.full_disk(), pytest.warns(UserWarning, match=sentence):
        assert run.evaluate(writer, -2) == ["10"]
    assert not list(run.folder.glob(".staging*"))

    def batch_ends() -> None:
        writer.on_train_batch_end(run.trainer, Mock(), None, None, 0)
        run.trainer.datamodule.stopping.agree()

    clock.now = 59.0
    batch_ends()
    batch_ends()
    assert len(complete(run.folder)) == 1
    clock.now = 60.0
    batch_ends()
    batch_ends()
    assert [checkpoint.order[0] for checkpoint in complete(run.folder)] == [10, 20]
    clock.now = 1000.0
    batch_ends()
    batch_ends()
    assert [checkpoint.order for checkpoint in complete(run.folder)] == [(10, 0), (20, 0)], "once is enough"


def test_a_save_that_was_asked_for_is_made_once(tmp_path: Path) -> None:
    writer, run = training(tmp_path)
    stopping, progress = run.trainer.datamodule.stopping, run.trainer.datamodule.progress
    stopping.save_wanted = True
    for progress.frames in range(1, 4):
        if progress.frames != 2:
            stopping.agree()
        writer.on_train_batch_end(run.trainer, Mock(), None, None, 0)
    assert [checkpoint.order[0] for checkpoint in complete(run.folder)] == [1]


def test_a_save_that_failed_is_tried_again_at_the_end(tmp_path: Path) -> None:
    """Also where the frame has a checkpoint, of before the updates that came since."""
    writer, run = training(tmp_path)
    run.evaluate(writer, -1)
    with run.full_disk(), pytest.warns(UserWarning, match="trying again"):
        writer.save(run.trainer)
    writer.on_train_end(run.trainer, Mock())
    assert [checkpoint.order for checkpoint in complete(run.folder)] == [(10, 0), (10, 1)]


def test_a_checkpoint_counts_though_older_ones_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thin_out = Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr("qsm_lightning.checkpoints.thin_out", thin_out)
    writer, run = training(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.evaluate(writer, -1)
        writer.on_train_end(run.trainer, Mock())
    assert thin_out.called
    assert [checkpoint.order for checkpoint in complete(run.folder)] == [(10, 0)], "nothing is owed"


def test_the_time_left_is_that_of_frames_with_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("qsm_lightning.callbacks.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    trainer, bar = stand_in(), cb.FrameProgress(line_seconds=10)
    progress = trainer.datamodule.progress
    bar.on_train_start(trainer, Mock())
    left = []
    for clock.now, progress.frames, progress.updates in [(10, 4000, 0), (20, 5000, 1000), (30, 6500, 2500)]:
        bar.on_train_batch_end(trainer, Mock(), None, None, 0)
        left.append(bar.get_metrics(trainer, Mock())["left"])
    assert left == ["0:00:15", "0:00:50", "0:00:28"]


def test_lines_are_printed_every_so_many_seconds_with_trainings_own_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between evaluations, whose time is not training's."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("qsm_lightning.callbacks.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    trainer, bar = stand_in(), cb.FrameProgress(line_seconds=10)
    trainer.callback_metrics = {"eval/return": torch.tensor(-3.0)}
    progress = trainer.datamodule.progress

    def printed_after(now: float, frames: int) -> str:
        clock.now, progress.frames, progress.updates = now, frames, 2 * frames
        bar.on_train_batch_end(trainer, Mock(), None, None, 0)
        return capsys.readouterr().out

    bar.on_train_start(trainer, Mock())
    assert printed_after(9.9, 990) == ""
    assert "frames 1000/10000 frames/s 100 updates/s 200" in printed_after(10, 1000)
    assert printed_after(14, 1400) == ""
    bar.on_validation_start(trainer, Mock())
    clock.now = 100
    bar.on_validation_end(trainer, Mock())
    assert "frames 1400/10000 return -3.0 frames/s 100 updates/s 200" in capsys.readouterr().out
    assert printed_after(109.9, 2390) == ""
    assert "frames 2400/10000 return -3.0 frames/s 100 updates/s 200" in printed_after(110, 2400)


def metered(**settings: Any) -> tuple[Mock, Mock]:
    """A trainer and a module of which TrainingMetrics can write a row."""
    recent = RecentExperience([3.0, 5.0], [10, 20], frames=100, at_bounds=25.0)
    trainer = stand_in(0, buffer=[0] * 7, take_recent=Mock(return_value=recent), **settings)
    trainer.optimizers = [Mock(param_groups=[{"lr": 0.1}]), Mock(param_groups=[{"lr": 0.2}])]
    module = Mock(metrics={"loss/qvalue": torch.tensor(2.5)}, loss=SimpleNamespace(terms=("qvalue", "actor")))
    return trainer, module


def test_metrics_are_written_every_so_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr("qsm_lightning.callbacks.metrics.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer, module = metered()
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


def test_the_time_of_evaluations_does_not_slow_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("qsm_lightning.callbacks.metrics.time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer, module = metered()
    callback = cb.TrainingMetrics(every_frames=100)
    callback.on_train_start(trainer, module)
    for begins, ends in ((3, 20), (22, 30)):
        clock.now = begins
        callback.on_validation_start(trainer, module)
        clock.now = ends
        callback.on_validation_end(trainer, module)
    clock.now = 35
    trainer.datamodule.progress.frames, trainer.datamodule.progress.updates = 100, 50
    callback.on_train_batch_end(trainer, module, None, None, 0)
    (metrics,), _ = trainer.loggers[0].log_metrics.call_args
    assert (metrics["speed/frames_per_s"], metrics["speed/updates_per_s"]) == (10, 5), "in 3 + 2 + 5 seconds"


def test_metrics_are_those_of_all_ranks() -> None:
    """Counts are their sums, losses their means, and episodes are put together."""
    other = {
        "recent": {"returns": [10.0], "lengths": [30], "frames": 100, "at_bounds": 0.0, "staleness": []},
        **{"buffer_size": 13, "episodes": 5, "losses": {"loss/qvalue": 0.5}},
    }
    trainer, module = metered(ranks=SimpleNamespace(gather=lambda mine: [mine, other]))
    trainer.datamodule.progress.frames, trainer.datamodule.progress.episodes = 200, 2
    callback = cb.TrainingMetrics(every_frames=200)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, None, 0)
    (metrics,), _ = trainer.loggers[0].log_metrics.call_args
    expected = {"episodes": 7, "buffer_size": 20, "return": 6.0, "length": 20.0, "actions_at_bounds": 0.125}
    assert {key: metrics[f"train/{key}"] for key in expected} == expected
    assert metrics["loss/qvalue"] == 1.5


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


def test_the_picture_shows_the_mean_of_the_critics() -> None:
    torch.manual_seed(0)
    loss = SMALL(3, 1)
    state = torch.randn(1, 3)
    (curve,) = draw_policy(loss, state, samples=5).axes[0].get_lines()
    x, y = np.asarray(curve.get_xydata()).T
    with torch.no_grad():
        one, other = loss.critics(state.expand(len(x), -1), torch.as_tensor(x, dtype=torch.float32)[:, None]).numpy()
    assert np.abs(one - other).min() > 1e-3
    np.testing.assert_allclose(y, (one + other) / 2, rtol=1e-4, atol=1e-6)


class Averages:
    """Stands for a module's ``averaged_weights``, and tells whether one is within it."""

    within = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.within = True
        yield
        self.within = False


def test_pictures_and_videos_are_of_the_averaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = stand_in(5, buffer=[0], env_name="Pendulum-v1", surviving=lambda act, mend: act())
    trainer.loggers, trainer.ckpt_path, trainer.default_root_dir = [TensorBoardLogger(str(tmp_path))], None, tmp_path
    seen: list[bool] = []
    averages = Averages()

    def drawn(*args: Any, **kwargs: Any) -> Any:
        seen.append(averages.within)
        return np.zeros((1, 8, 8, 3), np.uint8), 0.0

    monkeypatch.setattr("qsm_lightning.callbacks.policy_picture.draw_policy", drawn)
    monkeypatch.setattr("qsm_lightning.callbacks.video.record_episode", drawn)
    trainer.loggers[0].experiment.add_figure = Mock()
    picture = cb.PolicyPicture()
    picture.load_state_dict({"count": 0, "observations": torch.zeros(1, 3)})
    for callback in (picture, cb.EvaluationVideo()):
        callback.on_validation_end(trainer, Mock(averaged_weights=averages))
    assert seen == [True, True]
    assert not averages.within


def test_the_picture_of_a_finished_run(tmp_path: Path) -> None:
    run = trained(tmp_path, "--config=pendulum", *SHRINK, "--data.eval_selector=sample")
    policy_picture.main(str(run), str(tmp_path / "policy.png"))
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")


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
        callback.on_validation_end(trainer, Mock(loss=loss, averaged_weights=nullcontext))
    assert [call.args[0] for call in add.call_args_list] == ["policy"] * 2
    assert add.call_args.args[2] == 500
    restored = cb.PolicyPicture(every_evaluations=2)
    restored.load_state_dict(callback.state_dict())
    assert torch.equal(restored._observations, callback._observations)  # type: ignore[arg-type]
    none = cb.PolicyPicture(0)
    for _ in range(3):
        none.on_validation_end(trainer, Mock(loss=loss, averaged_weights=nullcontext))
    assert add.call_count == 2


def test_no_picture_is_drawn_before_there_are_states(tmp_path: Path) -> None:
    """As where a run goes on with an evaluation, and its checkpoint had no buffer."""
    trainer = stand_in(500, buffer=[], experience=Mock(offline=None))
    trainer.loggers = [TensorBoardLogger(str(tmp_path))]
    callback = cb.PolicyPicture()
    callback.on_validation_end(trainer, Mock(loss=SMALL(3, 1)))
    assert callback.state_dict() == {"count": 1, "observations": None}


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
    with torch.random.fork_rng():
        torch.manual_seed(2)
        env.set_seed(1)
        whole = env.rollout(1000, loss.evaluation_policy())["next", "reward"].sum().item()
    assert episode_return == pytest.approx(whole, rel=1e-5), "of the whole episode, not of the part that is shown"


def test_an_episode_without_an_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsm_lightning.recording.MAX_EPISODE_FRAMES", 7)
    steps: list[None] = []
    policy = SMALL(3, 1).evaluation_policy()
    frames, _ = record_episode("Pendulum-v1", policy, 1, 2, each_step=lambda: steps.append(None))
    assert len(frames) == len(steps) == 7

    def stop() -> None:
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        record_episode("Pendulum-v1", policy, 1, 2, each_step=stop)


def test_a_signal_in_a_video_leaves_it_for_the_checkpoint_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    episode = Mock(side_effect=Interrupted(signal.SIGTERM))
    data = SimpleNamespace(env_name="Pendulum-v1", stopping=SimpleNamespace(leave=None), surviving=lambda act, _: act())
    monkeypatch.setattr("qsm_lightning.callbacks.video.record_episode", episode)
    monkeypatch.setattr("qsm_lightning.callbacks.video.datamodule_of", lambda _: data)
    trainer: Any = SimpleNamespace(is_global_zero=True, sanity_checking=False)  # asked for a logger, it would fail
    cb.EvaluationVideo().on_validation_end(trainer, Mock(averaged_weights=nullcontext))
    assert episode.called


@pytest.mark.parametrize("fault", [RuntimeError("no GL context"), NotImplementedError(), None])
def test_rendering_that_fails_is_said_before_training(fault: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    render = Mock(side_effect=fault, return_value=None)
    monkeypatch.setattr("qsm_lightning.recording.make_render_env", lambda name: (Mock(), render))
    with pytest.raises(SettingError, match="no GL context.*MUJOCO_GL=egl" if str(fault or "") else "no rgb_array"):
        cb.EvaluationVideo().setup(stand_in(env_name="Hopper-v5"), Mock(), "fit")


@pytest.mark.parametrize("name", ["envpool:Hopper-v5", "qsm_lightning/TwoGoals-v0"])
def test_what_is_not_rendered(name: str) -> None:
    with pytest.raises(SettingError, match=f"^{name} cannot be rendered"):
        make_render_env(name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cb.TrainingMetrics(0), "metrics.every_frames"),
        (lambda: cb.PolicyPicture(-1), "picture.every_evaluations"),
        (lambda: cb.PolicyPicture(states=0), "picture.states"),
        (lambda: cb.PolicyPicture(states=100_000), "picture.states is 100000: it must be at most 20"),
        (lambda: cb.PolicyPicture(samples=10**10), "picture.samples is 10+: it must be at most 10000"),
        (lambda: cb.EvaluationVideo(0), "every_evaluations"),
        (lambda: cb.EvaluationVideo(seed=-1), "seed is -1: it must be from 0"),
        (lambda: cb.RunCheckpoint(every_frames=0), "checkpoint.every_frames"),
        (lambda: cb.RunCheckpoint(keep_last=0), "checkpoint.keep_last"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make()
