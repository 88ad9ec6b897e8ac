"""Learning from datasets: what is read from each kind, what reaches the updates, and going on online."""

from __future__ import annotations

import logging
import re
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from benchmarks.training import quiet_trainer
from tensordict import TensorDict, TensorDictBase

from qsm_lightning import checkpoints, datasets
from qsm_lightning.commands import collect
from qsm_lightning.commands.base import write_results
from qsm_lightning.commands.trained import Trained, load
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError
from qsm_lightning.losses import QSM, SAC
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.replay import FRAME_KEYS
from qsm_lightning.seeding import Purpose, derive_seed
from tests.compare import assert_same, state
from tests.conftest import Command, FullDisk
from tests.fake_envs import Clock
from tests.helpers import FIRST, SHRINK, has, replay_batch
from tests.processes import fit, trained

CLOCK = "tests.fake_envs:Clock-v0"
MARK = -77.0  # an observation that the environment does not give
RNG = np.random.default_rng(0)


def arrays(count: int = 12, observation_dim: int = 2, action_dim: int = 1) -> dict[str, np.ndarray]:
    """Random transitions in D4RL's layout: the fifth ends an episode in a terminal state, the eighth by time."""
    ends = np.arange(1, count + 1)
    return {
        "observations": RNG.normal(size=(count, observation_dim)).astype(np.float32),
        "actions": RNG.uniform(-1, 1, (count, action_dim)).astype(np.float32),
        "rewards": RNG.normal(size=count).astype(np.float32),
        "terminals": ends == 5,
        "timeouts": ends == 8,
    }


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(one: TensorDictBase, two: TensorDictBase) -> bool:
    return len(one) == len(two) and all(torch.equal(one[key], two[key]) for key in FRAME_KEYS)


# Reading.


def test_what_follows_is_what_comes_next_in_the_episode() -> None:
    """Transition by transition, by hand: the eighth has no known successor, and nor has the last."""
    raw = arrays()
    frames = datasets.from_d4rl(raw)
    kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert len(frames) == len(kept)
    for row, i in zip(frames, kept, strict=True):
        assert torch.equal(row["observation"], torch.tensor(raw["observations"][i]))
        assert torch.equal(row["action"], torch.tensor(raw["actions"][i]))
        assert row["next", "reward"].item() == raw["rewards"][i]
        assert row["next", "terminated"].item() == row["next", "done"].item() == (i == 4)
        if i != 4:
            assert torch.equal(row["next", "observation"], torch.tensor(raw["observations"][i + 1]))


def test_given_successors_are_taken_and_keep_every_transition() -> None:
    raw = arrays() | {"next_observations": RNG.normal(size=(12, 2)).astype(np.float32)}
    frames = datasets.from_d4rl(raw)
    assert torch.equal(frames["next", "observation"], torch.tensor(raw["next_observations"]))
    assert frames["next", "done"].squeeze(-1).nonzero().flatten().tolist() == [4, 7]
    assert frames["next", "terminated"].squeeze(-1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("kind", ["npz", "h5"])
def test_a_file_gives_what_its_arrays_do(kind: str, tmp_path: Path) -> None:
    raw, path = arrays(), tmp_path / f"data.{kind}"
    if kind == "npz":
        np.savez(path, **raw)  # type: ignore[arg-type]
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for name, value in raw.items():
                file[name] = value
    assert equal(datasets.load(str(path), 2, 1), datasets.from_d4rl(raw))


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    frames = replay_batch(20)
    datasets.save_npz(tmp_path / "data.npz", frames)
    assert equal(datasets.load(str(tmp_path / "data.npz"), 3, 2), frames)
    with np.load(tmp_path / "data.npz") as file:
        terminals, timeouts = file["terminals"], file["timeouts"]
    assert terminals.any()
    assert timeouts.any()
    assert not (terminals & timeouts).any(), "an episode ends in one way"
    assert ((terminals | timeouts) == frames["next", "done"].squeeze(-1).numpy()).all()


@pytest.mark.parametrize("key", FRAME_KEYS, ids=str)
def test_a_fingerprint_is_of_all_that_is_learned_from(key: Any) -> None:
    frames = replay_batch(20)
    changed = frames.clone()
    changed[key][-1] = changed[key][-1] == 0
    assert datasets.fingerprint(frames) == datasets.fingerprint(frames.clone()) != datasets.fingerprint(changed)


def test_a_dataset_has_a_transition_for_every_rank(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays())  # type: ignore[arg-type]
    data = OffPolicyDataModule(CLOCK, dataset=str(tmp_path / "data.npz"), batch_size=110)
    data.check_ranks(10)
    with pytest.raises(SettingError, match="data.dataset has 10 transitions: each of 11 processes needs one"):
        data.check_ranks(11)


@pytest.mark.skipif(not has("minari"), reason="the extra offline is not installed")
@pytest.mark.parametrize("kind", ["vector", "dictionary"])
def test_a_minari_dataset(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two episodes written with Minari itself, actions in the environment's own bounds, [-2, 6]."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    space: gym.Space[Any] = Clock.observation_space
    if kind == "dictionary":
        space = gym.spaces.Dict({"step": box, "episode": box})
    buffers, expected = [], []
    for length, terminated in ((3, True), (2, False)):
        seen = RNG.normal(size=(length + 1, 2))
        action = RNG.uniform(-2, 6, (length, 1)).astype(np.float32)
        ends = np.arange(length) == length - 1
        observations: Any = seen if kind == "vector" else {"episode": seen[:, :1], "step": seen[:, 1:]}
        reward = RNG.normal(size=length)
        buffers.append(
            EpisodeBuffer(
                observations=observations,
                actions=action,
                rewards=list(reward),
                terminations=list(ends & terminated),
                truncations=list(ends & (not terminated)),
            )
        )
        scaled = {"observations": seen[:-1], "actions": (action - 2) / 4, "next_observations": seen[1:]}
        timeouts = ends & (not terminated)
        expected.append(
            datasets.from_d4rl({**scaled, "rewards": reward, "terminals": ends & terminated, "timeouts": timeouts})
        )
    minari.create_dataset_from_buffers(
        "clock/test-v0", buffers, observation_space=space, action_space=Clock.action_space
    )
    found, wanted = datasets.load("minari:clock/test-v0", 2, 1), TensorDict.cat(expected)
    for key in FRAME_KEYS:
        torch.testing.assert_close(found[key], wanted[key])


DISCRETE, BOX, TEXT = gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (1,)), gym.spaces.Text(1, min_length=1)
PAIR = gym.spaces.Tuple((BOX, BOX))


@pytest.mark.skipif(not has("minari"), reason="the extra offline is not installed")
@pytest.mark.parametrize(
    ("observation", "action", "pattern"),
    [
        (BOX, DISCRETE, r"its actions are Discrete\(2\), and only bounded continuous ones"),
        (BOX, gym.spaces.Box(-np.inf, 1, (1,)), "its actions are Box.*only bounded continuous ones"),
        (TEXT, BOX, "its observations are not arrays of numbers"),
        (PAIR, BOX, "its observations are not arrays of numbers"),
        (
            gym.spaces.Box(-1, 1, (2,)),
            gym.spaces.Box(-1, 1, (2,)),
            r"actions have the shape \[2\], and data.env has \[1\]",
        ),
    ],
)
def test_a_minari_dataset_that_does_not_fit_is_refused(
    observation: gym.Space[Any], action: gym.Space[Any], pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    seen = [observation.sample(), observation.sample()]
    buffer = EpisodeBuffer(
        observations=_of_an_episode(observation, seen),
        actions=np.stack([action.sample()]),
        rewards=[0.0],
        terminations=[True],
        truncations=[False],
    )
    minari.create_dataset_from_buffers("odd/test-v0", [buffer], observation_space=observation, action_space=action)
    with pytest.raises(SettingError, match=pattern):
        OffPolicyDataModule(CLOCK, dataset="minari:odd/test-v0")


def _of_an_episode(space: gym.Space[Any], seen: list[Any]) -> Any:
    """Observations as Minari wants them."""
    if space is PAIR:
        return tuple(np.stack(part) for part in zip(*seen, strict=True))
    return seen if space is TEXT else np.stack(seen)


@pytest.mark.skipif(not has("minari"), reason="the extra offline is not installed")
def test_a_minari_dataset_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    seen = np.zeros((3, 1), np.float32)
    ends = [False, True]
    buffer = EpisodeBuffer(
        observations=seen, actions=seen[:2], rewards=[0.0, 0.0], terminations=ends, truncations=[False, False]
    )
    minari.create_dataset_from_buffers("torn/test-v0", [buffer], observation_space=BOX, action_space=BOX)
    (file,) = tmp_path.rglob("*.hdf5")
    with pytest.importorskip("h5py").File(file, "a") as content:
        del content["episode_0/actions"]
    with pytest.raises(SettingError, match=r"'minari:torn/test-v0': Minari cannot read it \(.*; choose another"):
        datasets.load("minari:torn/test-v0", 1, 1)


@pytest.mark.skipif(not has("minari"), reason="the extra offline is not installed")
def test_a_minari_name_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(SettingError, match=r"'minari:not a name': Minari cannot load it \(.*list_remote_datasets"):
        OffPolicyDataModule(CLOCK, dataset="minari:not a name")


def test_the_saved_buffer_of_a_run(tmp_path: Path) -> None:
    run = trained(tmp_path, "--config=pendulum", *SHRINK, "--data.buffer_size=50", "--model.compile=false")
    saved = TensorDict(state(run)["OffPolicyDataModule"]["ranks"][0]["replay"], [50]).unflatten_keys(".")
    for folder in (run, next((run / "checkpoints").glob("0*"))):
        assert equal(datasets.load(str(folder), 3, 1), saved)


def test_the_saved_buffer_of_a_run_of_the_first_version() -> None:
    """Whose ranks do not tell how many frames their buffers hold."""
    frames = datasets.load(str(FIRST), 3, 1)
    assert len(frames) == 50, "the last, of 60"
    assert torch.equal(frames["next", "observation"][:-1], frames["observation"][1:])


def test_a_damaged_buffer_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIRST, tmp_path / "run")
    file = next((tmp_path / "run/checkpoints/replay").glob("*.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SettingError, match=r"data.dataset is '.*run': .*\.pt was altered.*name an older checkpoint"):
        datasets.load(str(tmp_path / "run"), 3, 1)


@pytest.mark.parametrize("made_in", ["Pendulum-v1", "Swing-v1"])
def test_data_of_another_environment_are_taken_with_a_warning(made_in: str, caplog: pytest.LogCaptureFixture) -> None:
    run = str(FIRST)
    datasets.load(run, 3, 1, env=made_in)
    said = f"data.dataset is '{run}': it was made in Pendulum-v1, and data.env is {made_in}"
    assert caplog.messages == ([] if made_in == "Pendulum-v1" else [said])


def test_that_episodes_may_be_joined_is_said(caplog: pytest.LogCaptureFixture) -> None:
    raw = arrays()
    datasets.from_d4rl(raw)
    datasets.from_d4rl({"next_observations": raw["observations"]} | {n: v for n, v in raw.items() if n != "timeouts"})
    assert not caplog.messages
    del raw["timeouts"]
    assert len(datasets.from_d4rl(raw)) == 11
    assert "has neither timeouts nor next_observations" in caplog.text


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"rewards": None}, "has no rewards; D4RL's layout"),
        ({"rewards": np.zeros(3)}, "differ in length"),
        ({"rewards": np.zeros((12, 2))}, r"rewards has the shape \[12, 2\]"),
        ({"actions": np.array(["left"] * 12)}, r"actions has the shape \[12\] and the type <U4"),
        ({"observations": np.zeros(())}, r"observations has the shape \[\]"),
        ({"rewards": np.array("none")}, r"rewards has the shape \[\] and the type <U4"),
        ({"observations": np.zeros((12, 5))}, r"observations have the shape \[5\], and data.env has \[2\]"),
        ({"actions": np.zeros((12, 2))}, r"actions have the shape \[2\], and data.env has \[1\]"),
        ({"actions": np.full((12, 1), 2.0)}, r"actions up to 2, and they must be in \[-1, 1\]"),
        ({"actions": np.full((12, 1), 1.0001)}, r"actions up to 1.0001, "),
        ({"rewards": np.full(12, np.nan)}, "next reward has NaN"),
        ({"terminals": np.full(12, np.nan)}, "terminals has other values than 0 and 1"),
        ({"timeouts": -np.ones(12)}, "timeouts has other values than 0 and 1"),
        ({"terminals": np.zeros(12), "timeouts": np.ones(12)}, "no transitions"),
        ({"rewards": np.array([None] * 12)}, "cannot be read"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(change: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    raw = {name: value for name, value in (arrays() | change).items() if value is not None}
    np.savez(tmp_path / "data.npz", **raw)
    with pytest.raises(SettingError, match=pattern):
        OffPolicyDataModule(CLOCK, dataset=str(tmp_path / "data.npz"))


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"dataset": "gone.npz"}, "'gone.npz': there is no such file"),
        ({"dataset": ""}, "data.dataset is '': name a file"),
        ({"dataset": "data.csv"}, "give an .npz, .h5 or .hdf5 file"),
        ({"dataset": "text.npz"}, "'text.npz': it cannot be read"),
        ({"dataset": "torn.npz"}, "'torn.npz': it cannot be read"),
        ({"dataset": "empty"}, "'empty': it is neither a run"),
        ({"dataset": "good.npz", "offline_share": 1.5}, "data.offline_share is 1.5"),
        ({"dataset": "good.npz", "offline_frames": -1}, "data.offline_frames is -1"),
        ({"dataset": "good.npz", "offline_frames": 2_000_000}, "data.offline_frames is 2000000.*total_frames"),
        ({"offline_frames": 10}, "data.offline_frames is 10.*give data.dataset"),
        ({"dataset": "good.npz", "offline_frames": 10, "collector": "processes"}, "set data.collector to local"),
    ],
)
def test_settings_of_datasets(
    settings: dict[str, Any], pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.npz").write_text("text")
    np.savez("good.npz", **arrays())  # type: ignore[arg-type]
    Path("torn.npz").write_bytes(Path("good.npz").read_bytes()[:700])
    with pytest.raises(SettingError, match=pattern):
        OffPolicyDataModule(CLOCK, **settings)


@pytest.mark.parametrize(("source", "package"), [("minari:any/set-v0", "minari"), ("data.h5", "h5py")])
def test_an_extra_that_is_not_installed_is_named(
    source: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.h5").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = rf"^data.dataset is of its kind: {package} is not installed; pip install 'qsm-lightning\[offline\]'"
    with pytest.raises(SettingError, match=words):
        datasets.load(source, 2, 1)


def test_hdf5_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for name, value in (("text", "none"), ("group", None)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, array in (arrays() | {"rewards": value}).items():
                if array is None:
                    file.create_group(key)
                else:
                    file[key] = array
        with pytest.raises(SettingError, match=rf"data.dataset is '.*{name}.h5': (rewards has the shape|it cannot be)"):
            datasets.load(str(tmp_path / f"{name}.h5"), 2, 1)


# Training.


class Seen(QSM):
    """Notes how many frames of each minibatch are marked."""

    marked: list[int]

    def qvalue_loss(self, tensordict: TensorDictBase) -> Any:
        self.marked.append(int((tensordict["observation"][:, 0] == MARK).sum()))
        return super().qvalue_loss(tensordict)


def test_offline_first_and_then_a_fixed_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of the environment in the first 20 frames; then as many frames of its own as there are, up to 6 of 8."""
    raw = arrays(100)
    raw["observations"][:, 0] = MARK
    np.savez(tmp_path / "data.npz", **raw)  # type: ignore[arg-type]
    marked: list[int] = []
    steps: list[int] = []
    monkeypatch.setattr(Seen, "marked", marked, raising=False)
    step = Clock.step

    def noted(self: Clock, action: np.ndarray) -> Any:
        steps.append(len(marked))
        return step(self, action)

    monkeypatch.setattr(Clock, "step", noted)
    data = OffPolicyDataModule(
        CLOCK,
        total_frames=30,
        batch_size=8,
        utd=2,
        dataset=str(tmp_path / "data.npz"),
        offline_frames=20,
        offline_share=0.25,
        eval_every_frames=30,
        eval_episodes=1,
    )
    quiet_trainer(tmp_path).fit(OffPolicyModule(2, 1, partial(Seen, hidden=(8,), time_dim=4, T=2)), data)
    online = [8 - min(6, frame) for frame in range(1, 11) for _ in range(2)]
    assert marked == [8] * 40 + online, "two updates a frame, from the first frame on"
    assert min(steps) == 40, "before the last offline update"
    assert len(data.buffer) == 10


def test_a_dataset_without_an_offline_phase_keeps_the_warm_up(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays(100))  # type: ignore[arg-type]
    settings = {"dataset": str(tmp_path / "data.npz"), "eval_every_frames": 40, "eval_episodes": 1}
    data = OffPolicyDataModule(CLOCK, total_frames=40, batch_size=8, init_random_frames=30, **settings)  # type: ignore[arg-type]
    quiet_trainer(tmp_path).fit(OffPolicyModule(2, 1, partial(QSM, hidden=(8,), time_dim=4, T=2)), data)
    assert (data.progress.updates, len(data.buffer)) == (10, 40)


def test_going_on_offline_and_online_is_exact(tmp_path: Path) -> None:
    """From checkpoints of both phases, and with the dataset in another place; other transitions are refused."""
    np.savez(tmp_path / "data.npz", **arrays(100, 3))  # type: ignore[arg-type]
    whole = tmp_path / "whole"
    whole.mkdir()
    settings = [
        *("--config=pendulum", *SHRINK, "--data.dataset=../data.npz", "--data.offline_frames=30"),
        *("--data.total_frames=60", "--data.eval_every_frames=20", "--model.compile=false", "--model.loss.bc_coef=1"),
    ]
    fit(whole, *settings, "--checkpoint.every_frames=15", "--checkpoint.keep_last=9")
    np.savez(tmp_path / "other.npz", **arrays(100, 3))  # type: ignore[arg-type]
    for frame in (15, 45):
        again = tmp_path / str(frame)
        shutil.copytree(whole, again)
        (again / "moved.npz").write_bytes((tmp_path / "data.npz").read_bytes())
        run = next(again.glob("runs/*/*"))
        start = next(c for c in checkpoints.complete(run / "checkpoints") if c.order[0] >= frame)
        resume = ("--config", run / "config.yaml", "--ckpt_path", start.path)
        before = snapshot(run)
        refused = fit(again, *resume, "--data.dataset=../other.npz", status=2)
        assert "data.dataset is '../other.npz': the checkpoint's run learned from another" in refused
        assert snapshot(run) == before
        fit(again, *resume, "--data.dataset=moved.npz")
        assert_same(next(whole.glob("runs/*/*")), run)


def test_offline_alone(tmp_path: Path) -> None:
    """All of the run: the checkpoint has no frames of its own, and can be evaluated."""
    np.savez(tmp_path / "data.npz", **arrays(100, 3))  # type: ignore[arg-type]
    settings = ["--data.dataset=data.npz", "--data.offline_frames=60", "--model.compile=false"]
    run = trained(tmp_path, "--config=pendulum", *SHRINK, *settings)
    saved = checkpoints.load(checkpoints.complete(run / "checkpoints")[-1].state)["OffPolicyDataModule"]
    assert (saved["progress"]["updates"], saved["ranks"][0]["written"]) == (60, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_trained_policys_transitions_are_enough_to_learn_from(command: Command) -> None:
    """Half of them random: offline to four fifths of the way from a random policy's -1200, and better yet online."""

    def last(*args: str) -> float:
        result = command("qsm-fit", *args, timeout=1800)
        assert result.returncode == 0, result.stderr
        return float(re.search(r"final return: (-?[\d.]+)", result.stdout)[1])  # type: ignore[index]

    pendulum = ["--config=pendulum", "--data.eval_selector=sample"]
    taught = last(*pendulum, "--name=teacher")
    assert taught > -300
    collected = command(
        "qsm-collect", "runs/teacher/version_0", "--frames=10000", "--random=0.5", "--out=mixed.npz", timeout=900
    )
    assert collected.returncode == 0, collected.stderr
    settings = [*pendulum, "--config=algo/qsm_offline", "--data.dataset=mixed.npz", "--data.eval_every_frames=1000"]
    offline = last(*settings, "--data.offline_frames=3000", "--data.total_frames=3000", "--name=offline")
    assert offline > -1200 + 0.8 * (taught + 1200)
    online = last("--resume=runs/offline/version_0", "--data.total_frames=6000")
    assert online > offline


# qsm-collect.


def test_collected_transitions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, full_disk: FullDisk
) -> None:
    """As many as asked for, of whole episodes in order; the same again from the same seed; random ones at first."""
    run = trained(tmp_path, "--config=pendulum", *SHRINK, "--model.compile=false")
    capsys.readouterr()
    for name in ("one", "two"):
        collect.run([str(run), "--frames=450", f"--out={tmp_path / name}.npz", "--random=0.5"])
    said = capsys.readouterr().out
    assert "frames: 450\nepisodes: 2\nmean return: -" in said
    one, two = (datasets.load(str(tmp_path / f"{name}.npz"), 3, 1) for name in ("one", "two"))
    assert equal(one, two)
    assert one["next", "done"].squeeze(-1).nonzero().flatten().tolist() == [199, 399]
    inside = ~one["next", "done"].squeeze(-1)[:-1]
    assert torch.equal(one["next", "observation"][:-1][inside], one["observation"][1:][inside])
    for name, option in (("three", "--seed=1"), ("four", "--random=0")):
        collect.run([str(run), "--frames=450", f"--out={tmp_path / name}.npz", "--random=0.5", option])
        assert not equal(one, datasets.load(str(tmp_path / f"{name}.npz"), 3, 1))
    first, rest = (part.flatten().sort().values for part in one["action"].split(225))
    uniform = torch.linspace(-1, 1, 225)
    assert (first - uniform).abs().max() < 0.2
    assert (rest - uniform).abs().max() > 0.3
    with caplog.at_level(logging.WARNING):
        datasets.load(str(tmp_path / "one.npz"), 3, 1, env="Pendulum-v1")
        assert "made in" not in caplog.text
        datasets.load(str(tmp_path / "one.npz"), 3, 1, env="Pendulum-v0")
    assert "it was made in Pendulum-v1, and data.env is Pendulum-v0" in caplog.text
    with pytest.raises(SettingError, match=r"--frames is 100000000000000: that takes .* TiB of memory.*give fewer"):
        collect.run([str(run), f"--frames={10**14}", f"--out={tmp_path / 'four.npz'}"])
    full_disk(tmp_path)
    with pytest.raises(SettingError, match=r"--out is .*five.npz', which cannot be written .*No space left"):
        collect.run([str(run), "--frames=5", f"--out={tmp_path / 'five.npz'}"])
    with pytest.raises(SettingError, match="--out is .*, which cannot be written .*No space left"):
        write_results(tmp_path, "", {"modes.json": b"{}"})


def test_an_environment_that_has_changed_is_told(tmp_path: Path) -> None:
    module = cast(Any, SimpleNamespace(loss=SAC(3, 1, hidden=(8,)), hparams={"observation_dim": 3, "action_dim": 1}))
    loaded = Trained(tmp_path / "state.ckpt", module, {"env": CLOCK}, 0)
    with pytest.raises(SettingError, match="trained with an observation of 3 numbers, and that of .*Clock-v0 has 2"):
        loaded.make_env()


def test_which_actions_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are evaluated, with averaged weights; the best by Q; those of training, with its own weights."""
    settings = ("--model.compile=false", "--model.ema=0.999", "--model.actor_lr=0.01")
    loaded = load(str(trained(tmp_path, "--config=pendulum", *SHRINK, *settings)))
    for kind, averaged in (("sample", True), ("best_of_n", True), ("exploration", False)):
        context = Mock(return_value=nullcontext())
        monkeypatch.setattr(OffPolicyModule, "averaged_weights", context)
        collect.collect(loaded, 5, kind)
        assert context.called == averaged
    monkeypatch.undo()
    found = {kind: collect.collect(loaded, 50, kind)[0] for kind in ("sample", "best_of_n", "exploration")}
    critics = loaded.module.loss.critics
    value = {kind: critics(frames["observation"], frames["action"]).min(0).values for kind, frames in found.items()}
    assert value["best_of_n"][0] > value["sample"][0], "in the same state"
    assert not equal(found["sample"], found["exploration"])


def test_what_is_collected_has_random_streams_of_its_own(tmp_path: Path) -> None:
    """Of starts and of noise, which neither training nor evaluation has."""
    module = OffPolicyModule(3, 1, partial(QSM, hidden=(8,), time_dim=4, T=2))
    loaded = Trained(tmp_path, module, {"env": "Pendulum-v1"}, 0)
    noise: set[int] = set()
    module.loss.denoiser.fourier.register_forward_pre_hook(lambda *_: noise.add(torch.initial_seed()))
    found, _ = collect.collect(loaded, 5, seed=3)
    assert noise == {derive_seed(3, 0, Purpose.DATASET_NOISE)}
    env = loaded.make_env()
    env.set_seed(derive_seed(3, 0, Purpose.DATASET_ENV))
    assert torch.equal(found["observation"][0], env.reset()["observation"])


def test_actions_that_the_algorithm_lacks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(tmp_path, cast(Any, SimpleNamespace(loss=SAC(3, 1, hidden=(8,)))), {}, 0)
    with pytest.raises(SettingError, match="--selector is best_of_n: SAC has sample"):
        trained.policy("best_of_n", 8)
    monkeypatch.setattr(collect, "load", lambda *_: trained)
    with pytest.raises(SettingError, match="--actions is best_of_n: SAC has sample and exploration"):
        collect.run(["run", "--frames=5", "--actions=best_of_n", f"--out={tmp_path / 'data.npz'}"])


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--frames=0"], "--frames is 0"),
        (["--frames=5", "--random=2"], "--random is 2.0"),
        (["--frames=5", "--seed=-1"], "--seed is -1"),
        (["--frames=5", "--out=data.csv"], r"'data.csv'.*\.npz"),
        (["--frames=5"], "neither a checkpoint nor"),
    ],
)
def test_what_qsm_collect_refuses(args: list[str], pattern: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=pattern):
        collect.run([str(tmp_path), f"--out={tmp_path / 'data.npz'}", *args])
