"""The collector's short way for gymnasium against TorchRL's own."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector

from qsm_lightning.collect import GymCollector, make_collector
from qsm_lightning.envs import make_env
from qsm_lightning.losses import QSM
from tests.helpers import needs_dmc

STORED = ("observation", "action")
FOLLOWING = ("observation", "reward", "terminated", "done", "episode_reward", "step_count")


def collected(
    name: str, num_envs: int, frames_per_batch: int, chunks: int, short: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[TensorDictBase, TensorDictBase, bool]:
    """What is stored and counted of all frames in order of time, the collector's state, whether the way was short."""
    torch.manual_seed(0)
    env = make_env(name, num_envs)
    env.set_seed(0)
    sizes = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    policy = QSM(*sizes, hidden=(16, 16), time_dim=8, T=2).exploration_policy()
    collector = make_collector(env, policy, frames_per_batch, 3 * frames_per_batch)
    taken: list[bool] = []
    own = GymCollector._short_rollout

    def rollout(self: GymCollector, *args: object) -> TensorDictBase:
        taken.append(short)
        return own(self, *args) if short else Collector.rollout(self)  # type: ignore[arg-type]

    monkeypatch.setattr(GymCollector, "_short_rollout", rollout)
    whole = []
    for _, chunk in zip(range(chunks), collector, strict=False):
        flat = (chunk.transpose(0, 1) if chunk.ndim == 2 else chunk).reshape(-1)
        frame = flat.select(*STORED, *(("next", key) for key in FOLLOWING)).clone()
        whole.append(TensorDict(dict(frame.items()), frame.batch_size))
    env.close()
    monkeypatch.setattr(GymCollector, "_short_rollout", own)
    return torch.cat(whole), collector._carrier.clone(), any(taken)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "num_envs", "frames_per_batch", "chunks"),
    [
        ("Hopper-v5", 1, 1, 120),
        ("Hopper-v5", 3, 6, 40),
        ("tests.fake_envs:Wanderer-v0", 2, 2, 60),
        ("tests.fake_envs:Lists-v0", 1, 1, 60),
    ],
)
def test_frames_and_state_are_bitwise_torchrls(
    name: str, num_envs: int, frames_per_batch: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, actions of the policy, episodes that end; and it goes on the same."""
    ours, theirs = (collected(name, num_envs, frames_per_batch, chunks, short, monkeypatch) for short in (True, False))
    assert ours[2]
    assert ours[0]["next", "done"].any(), "no episode ended"
    for ours_of, theirs_of in zip(ours[:2], theirs[:2], strict=True):
        assert set(ours_of.keys(True, True)) == set(theirs_of.keys(True, True))
        assert ours_of.batch_size == theirs_of.batch_size
        for key in theirs_of.keys(True, True):
            assert ours_of[key].dtype == theirs_of[key].dtype, key
            assert torch.equal(ours_of[key], theirs_of[key]), key


@needs_dmc
def test_other_environments_take_torchrls_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not collected("dmc:cartpole/swingup", 1, 1, 6, True, monkeypatch)[2]
