"""Environments in continuous time: frames that tell their time step, other time steps, actions that move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl._utils import seed_generator

from qsm_lightning import datasets
from qsm_lightning.cli import run_name
from qsm_lightning.continuous import ContinuousTime, moving_action
from qsm_lightning.env_state import env_states, load_env_states
from qsm_lightning.envs import make_env
from qsm_lightning.errors import SettingError
from qsm_lightning.evaluation import run_episodes
from qsm_lightning.replay import make_replay_buffer
from qsm_lightning.trust import check_env
from tests.helpers import needs_dmc

DMC = pytest.param("dmc:walker/walk", marks=needs_dmc)


def rollout(name: str, frames: int, actions: torch.Tensor | None = None, num_envs: int = 1) -> TensorDictBase:
    """Frames [frames] or [num_envs, frames] with given actions [frames, A], else random ones."""
    torch.manual_seed(1)
    env = make_env(name, num_envs)
    env.set_seed(3)
    given = None if actions is None else iter(actions)

    def policy(tensordict: TensorDictBase) -> TensorDictBase:
        assert given is not None
        return tensordict.set("action", next(given))

    found = env.rollout(frames, None if given is None else policy, break_when_any_done=False)
    env.close()
    return found


@pytest.mark.parametrize(("name", "seconds"), [("Pendulum-v1", 0.05), ("Hopper-v5", 0.008), ("HalfCheetah-v5", 0.05)])
def test_frames_tell_their_time_step_and_are_otherwise_the_same(name: str, seconds: float) -> None:
    plain, timed = rollout(name, 30), rollout(f"continuous:{name}", 30)
    assert torch.equal(timed["next", "time_step"], torch.full((30, 1), seconds))
    for key in ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done")):
        assert torch.equal(plain[key], timed[key]), key


@needs_dmc
def test_dm_control_tells_its_time_step_too() -> None:
    assert rollout("continuous:dmc:walker/walk", 3)["next", "time_step"].unique().item() == pytest.approx(0.025)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", DMC])
def test_shorter_steps_with_the_same_actions_are_the_same_motion_with_the_same_return(name: str) -> None:
    """A step of gymnasium's cheetah is five of its simulator, one of dm_control's walker ten."""
    parts = 5
    actions = 2 * torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) - 1
    whole = rollout(f"continuous:{name}", 4, actions)
    fine = rollout(f"continuous:{name}?time_scale=1/{parts}", 4 * parts, actions.repeat_interleave(parts, 0))
    assert torch.allclose(fine["next", "observation"][parts - 1 :: parts], whole["next", "observation"], atol=1e-4)
    assert fine["next", "time_step"].sum().item() == pytest.approx(whole["next", "time_step"].sum().item(), rel=1e-5)
    if name == "HalfCheetah-v5":  # its reward is a velocity; others' are looked at more often
        rewards = fine["next", "reward"].view(4, parts).sum(1)
        assert torch.allclose(rewards, whole["next", "reward"][:, 0], atol=1e-4)


@pytest.mark.parametrize(("scale", "length"), [("1/4", 800), ("1", 200), ("2", 100)])
def test_an_episode_lasts_as_long_in_seconds(scale: str, length: int) -> None:
    following = rollout(f"continuous:Pendulum-v1?time_scale={scale}", length)["next"]
    assert following["truncated"].sum() == following["truncated"][-1].item() == 1
    assert following["time_step"].sum().item() == pytest.approx(10, rel=1e-5)
    assert -2000 < following["episode_reward"][-1].item() < -600, "a random policy's return, at every time step"


def test_irregular_steps_are_each_frame_s_own() -> None:
    following = rollout("continuous:Pendulum-v1?jitter=0.5", 1000)["next"]
    seconds = following["time_step"][:, 0]
    assert seconds.min() >= 0.025 - 1e-6
    assert seconds.max() <= 0.075 + 1e-6
    assert seconds.std().item() == pytest.approx(0.05 / 12**0.5, rel=0.1)
    # A pendulum's angle moves by its new speed times the time step.
    cos, sin, speed = following["observation"].unbind(-1)
    angle = torch.atan2(sin, cos)
    turned = (angle[1:] - angle[:-1]).remainder(2 * torch.pi)
    expected = (speed[1:] * seconds[1:]).remainder(2 * torch.pi)
    inside = ~following["done"][:-1, 0]
    off = (turned - expected + torch.pi).remainder(2 * torch.pi) - torch.pi
    assert off[inside].abs().max() < 1e-4


class OwnClock(gym.Env):
    """Its n-th step takes n tenths of a second."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self) -> None:
        self.dt = 0.1
        self.count = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.dt = 0.1 * self.count
        return np.zeros(1, np.float32), 1.0, False, False, {}


def test_an_environment_with_steps_of_its_own_is_asked_after_each() -> None:
    gym.register("tests/OwnClock-v0", f"{__name__}:OwnClock")
    try:
        following = rollout("continuous:tests/OwnClock-v0", 4)["next"]
    finally:
        del gym.registry["tests/OwnClock-v0"]
    assert torch.allclose(following["time_step"][:, 0], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert torch.equal(following["reward"], torch.ones(4, 1))


# The action as a state.


def test_the_policy_moves_the_action_and_the_environment_gets_it() -> None:
    u = torch.tensor([[1.0], [1.0], [-0.2], [-1.0], [-1.0], [-1.0], [-1.0]])
    frames = rollout("continuous:Pendulum-v1?max_speed=10", len(u), u)
    a = [0.0]
    for x in u[:, 0].tolist():
        a.append(min(max(a[-1] + 10 * x * 0.05, -1), 1))
    assert torch.allclose(frames["observation"][:, 3], torch.tensor(a[:-1]), atol=1e-6)
    assert torch.allclose(frames["next", "observation"][:, 3], torch.tensor(a[1:]), atol=1e-6)
    assert torch.equal(frames["action"], u)
    cos, sin, speed, _ = frames["observation"].unbind(-1)
    cost = torch.atan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * (2 * torch.tensor(a[:-1])) ** 2  # the torque is 2 a
    assert torch.allclose(frames["next", "reward"][:, 0], -cost, atol=1e-4)


def test_the_noise_has_the_variance_of_brownian_motion() -> None:
    torch.manual_seed(0)
    sigma, step = 0.4, 0.0125
    frames = rollout(f"continuous:Pendulum-v1?time_scale=1/4&max_speed=1&sigma={sigma}", 800)
    a, after = frames["observation"][:, -1], frames["next", "observation"][:, -1]
    noise = after - a - frames["action"][:, 0] * step
    inside = after.abs() < 1
    assert noise[inside].std().item() == pytest.approx(sigma * step**0.5, rel=0.1)


def test_a_horizon_terminates_and_its_share_is_seen() -> None:
    frames = rollout("continuous:Pendulum-v1?horizon=1", 45)
    assert frames["next", "terminated"][:, 0].nonzero().flatten().tolist() == [19, 39]
    fine = rollout("continuous:Pendulum-v1?horizon=8&time_scale=1/8", 1290)["next"]
    assert fine["terminated"][:, 0].nonzero().flatten().tolist() == [1279], "whatever is rounded on the way"
    beyond = rollout("continuous:Pendulum-v1?horizon=12", 250)["next"]
    assert beyond["terminated"][:, 0].nonzero().flatten().tolist() == [239], "longer than its own limit of steps"
    assert not beyond["truncated"].any()
    assert not frames["next", "truncated"].any()
    assert torch.allclose(frames["observation"][:20, 3], torch.arange(20) / 20, atol=1e-5)


def test_several_copies_go_on_and_begin_anew_each_on_its_own() -> None:
    frames = rollout("continuous:Pendulum-v1?horizon=1&jitter=0.5&max_speed=10&sigma=1", 100, num_envs=3)
    here, before = frames["observation"][:, 1:], frames["next", "observation"][:, :-1]
    done = frames["next", "done"][:, :-1, 0]
    assert torch.equal(here[~done], before[~done])
    assert torch.equal(here[done][:, 3:], torch.zeros(int(done.sum()), 2))
    assert len({tuple(row.nonzero().flatten().tolist()) for row in done}) == 3


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "continuous:Hopper-v5?max_speed=20&horizon=1",
        "continuous:Pendulum-v1?horizon=0.5&jitter=0.5",
        pytest.param(
            "continuous:dmc:cartpole/swingup?horizon=0.8&jitter=0.5&time_scale=4&max_speed=9", marks=needs_dmc
        ),
    ],
)
def test_episodes_are_evaluated_side_by_side_as_one_by_one(name: str, processes: bool) -> None:
    """Also when one is over sooner: its copy rests until the others' are."""

    class Act(TensorDictModuleBase):
        in_keys, out_keys = ["observation"], ["action"]

        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            width = together.action_spec.shape[-1]
            return tensordict.set("action", tensordict["observation"][..., :width].sin())

    together = make_env(name, 4, processes=processes)
    found = run_episodes(together, Act(), 7, 1)
    together.close()
    seed, each = 7, []
    for _ in range(4):
        each.append(run_episodes(make_env(name), Act(), seed, 1))
        seed = seed_generator(seed)
    assert len(set(found["length"].tolist())) > 1
    assert torch.equal(found["length"], torch.cat([one["length"] for one in each]))
    assert torch.allclose(found["return"], torch.cat([one["return"] for one in each]), rtol=1e-5)


def test_an_environment_s_state_has_its_clock() -> None:
    env = make_env("continuous:Pendulum-v1?jitter=0.5&max_speed=10")
    env.set_seed(0)
    start = env.rollout(7)[-1]["next"]
    saved = env_states(env)
    zeros = torch.zeros(5, 1)

    def go_on() -> torch.Tensor:
        steps, state = [], start.clone()
        for action in zeros:
            following = env.step(state.set("action", action))["next"]
            steps.append(torch.cat([following["observation"], following["time_step"]]))
            state = following.clone()
        return torch.stack(steps)

    once = go_on()
    load_env_states(env, saved)
    assert torch.equal(once, go_on())
    assert len(once[:, -1].unique()) == 5


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "continuous:Pendulum-v1?speed=3",
            "data.env has 'speed=3': give time_scale, jitter, max_speed, sigma, horizon",
        ),
        ("continuous:Pendulum-v1?time_scale=fast", "'fast' is not a number such as 0.25 or 1/4"),
        ("continuous:Pendulum-v1?time_scale=1/0", "'1/0' is not a number such as 0.25 or 1/4"),
        ("continuous:Pendulum-v1?time_scale=0", "data.env has time_scale=0.0: it must be a number from 1e-06 to 1e+06"),
        ("continuous:Pendulum-v1?time_scale=1e400", "data.env has time_scale=inf: it must be a number from 1e-06"),
        ("continuous:Pendulum-v1?time_scale=1e300", "data.env has time_scale=1e+300: it must be a number from 1e-06"),
        ("continuous:Pendulum-v1?max_speed=1&sigma=1e38", "data.env has sigma=1e+38: it must be from 0 to 1e+06"),
        ("continuous:Hopper-v5?jitter=0.1", "a step is 4 of the simulator, which jitter=0.1 cannot"),
        ("continuous:Pendulum-v1?jitter=1", "data.env has jitter=1.0: it must be at least 0 and below 1"),
        ("continuous:Pendulum-v1?sigma=1", "it is the noise of an action that moves; give max_speed as well"),
        ("continuous:Pendulum-v1?max_speed=-1", "data.env has max_speed=-1.0: it must be a number"),
        ("continuous:MountainCarContinuous-v0", "it does not tell its time step; give it an attribute dt, in seconds"),
        ("continuous:HalfCheetah-v5?time_scale=1/4", "a step is 1.25 steps of the simulator; give a multiple of 1/5"),
        ("continuous:envpool:Pendulum-v1", "envpool does not tell its time steps"),
        ("continuous:Pendulum-v9", "gymnasium cannot make it"),
    ],
)
def test_what_cannot_be_made_is_said_in_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(SettingError) as error:
        make_env(name)
    assert sentence in str(error.value)


def test_names_are_read_wherever_they_are_used() -> None:
    name = "continuous:dmc:cartpole/swingup?max_speed=20&time_scale=1/2"
    assert ContinuousTime.parse(name.removeprefix("continuous:")) == ContinuousTime("dmc:cartpole/swingup", 0.5, 0, 20)
    assert run_name(name) == "continuous-dmc-cartpole-swingup-max_speed=20-time_scale=1-2"
    check_env(name, "a checkpoint")
    with pytest.raises(SettingError, match="imports the module 'my'"):
        check_env("continuous:my:Id-v0?jitter=0.1", "a checkpoint")
    with pytest.raises(SettingError, match="imports the module 'this.a"):
        check_env("this.a?b:Id-v0", "a checkpoint")
    moving = moving_action(make_env("continuous:Pendulum-v1?max_speed=3"))
    assert moving is not None
    assert moving.time.max_speed == 3
    assert moving_action(make_env("continuous:Pendulum-v1?horizon=3")) is None


# What is stored.


def frames_of(name: str, count: int) -> TensorDict:
    return rollout(name, count).to_tensordict()


def test_time_steps_are_stored_where_there_are_any(tmp_path: Path) -> None:
    for name, stored in (("Pendulum-v1", False), ("continuous:Pendulum-v1?jitter=0.5", True)):
        buffer = make_replay_buffer(50)
        frames = frames_of(name, 60)
        for piece in (frames[:20], frames[20:40], frames[40:]):
            buffer.extend(piece)
        assert ("time_step" in buffer[:]["next"]) == ("time_step" in buffer.sample(8)["next"]) == stored
        if stored:
            assert torch.equal(buffer[:10]["next", "time_step"], frames[50:]["next", "time_step"])


def test_a_dataset_has_to_tell_time_steps_in_continuous_time(tmp_path: Path) -> None:
    timed, plain = frames_of("continuous:Pendulum-v1?jitter=0.5", 20), frames_of("Pendulum-v1", 20)
    datasets.save_npz(tmp_path / "timed.npz", timed)
    datasets.save_npz(tmp_path / "plain.npz", plain)
    found = datasets.load(str(tmp_path / "timed.npz"), 3, 1, timed=True)
    assert torch.equal(found["next", "time_step"], timed["next", "time_step"])
    assert "time_step" not in datasets.load(str(tmp_path / "timed.npz"), 3, 1)["next"]
    with pytest.raises(SettingError, match=r"do not tell their time steps.*add an array time_steps \[N\], in seconds"):
        datasets.load(str(tmp_path / "plain.npz"), 3, 1, timed=True)


def test_windows_are_frames_that_follow_each_other() -> None:
    """Against a search by hand in a ring of three environments' frames that has gone round."""
    copies, length, steps = 3, 7, 40
    found = rollout("continuous:Pendulum-v1?horizon=0.6&jitter=0.5", steps, num_envs=copies)
    in_time = found.transpose(0, 1).reshape(-1)
    buffer = make_replay_buffer(70, copies=copies)
    for start in range(0, len(in_time), copies):
        buffer.extend(in_time[start : start + copies])
    kept = in_time[-70:]
    windows = buffer.sample_windows(64, length)
    assert windows.batch_size == (64,)
    assert windows["observation"].shape == (64, length, 4)
    shorter = 0
    for window, inside in zip(windows["next", "observation"], windows["in_window"], strict=True):
        place = int((kept["next", "observation"] == window[0]).all(-1).nonzero()[0])
        expected = []
        for i in range(place, len(kept), copies)[:length]:
            expected.append(i)
            if kept["next", "done"][i]:
                break
        assert int(inside.sum()) == len(expected)
        assert inside[: len(expected)].all()
        assert torch.equal(window[: len(expected)], kept["next", "observation"][expected])
        shorter += len(expected) < length
    assert 0 < shorter < 64
