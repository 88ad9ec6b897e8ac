"""Evaluation episodes: whole, repeatable, and without a trace in training's generators."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from benchmarks.training import quiet_trainer
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from tensordict import TensorDictBase

from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.distributed import Ranks
from qsm_lightning.envs import make_env
from qsm_lightning.evaluation import run_episodes, summary
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.seeding import Purpose, derive_seed


def random_policy(td: TensorDictBase) -> TensorDictBase:
    return td.set("action", 2 * torch.rand(*td.shape, 3) - 1)


def test_episodes_end_where_they_end() -> None:
    """Hopper falls at a different step in each copy: returns and lengths against a single environment's loop."""
    episodes = run_episodes(make_env("Hopper-v5", 4), random_policy, 7, 8)
    assert len(set(episodes["length"].tolist())) > 1, "the copies should differ"
    env = make_env("Hopper-v5", 4)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        env.set_seed(7)
        state, total, length, alive = env.reset(), torch.zeros(4), torch.zeros(4), torch.ones(4, dtype=torch.bool)
        while alive.any():
            step, state = env.step_and_maybe_reset(random_policy(state))
            total += step["next", "reward"][:, 0] * alive
            length += alive
            alive &= ~step["next", "done"][:, 0]
    torch.testing.assert_close(episodes["length"], length)
    torch.testing.assert_close(episodes["return"], total, rtol=1e-4, atol=1e-4)


def test_a_single_environment_gives_one_episode() -> None:
    episodes = run_episodes(make_env("Pendulum-v1"), QSM(3, 1, hidden=(8,)).evaluation_policy(), 1, 2)
    assert episodes["length"].tolist() == [200]


@pytest.mark.parametrize("selector", ["sample", "best_of_n"])
def test_evaluation_is_repeatable_and_leaves_the_generators_alone(selector: str) -> None:
    torch.manual_seed(3)
    env, loss = make_env("Hopper-v5", 2), QSM(11, 3, hidden=(8,), time_dim=4)
    before = torch.get_rng_state()
    first = run_episodes(env, loss.evaluation_policy(selector, 4), 1, 2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    again = run_episodes(env, loss.evaluation_policy(selector, 4), 1, 2)
    assert torch.equal(first["return"], again["return"])


def test_summary_is_recomputed() -> None:
    returns, lengths = [1.0, 4.0, 7.0], [10.0, 20.0, 60.0]
    out = summary({"return": torch.tensor(returns), "length": torch.tensor(lengths)})
    assert out["mean"] == statistics.mean(returns)
    assert out["std"] == pytest.approx(statistics.pstdev(returns))
    assert (out["min"], out["max"], out["length"], out["episodes"]) == (1.0, 7.0, 30.0, 3)


def test_seeds_differ_between_purposes_and_ranks() -> None:
    seeds = {derive_seed(seed, rank, purpose) for seed in range(5) for rank in range(4) for purpose in Purpose}
    assert len(seeds) == 5 * 4 * len(Purpose)
    assert derive_seed(1, 0, Purpose.TRAIN_ENV) == derive_seed(1, 0, Purpose.TRAIN_ENV)


def test_each_rank_evaluates_the_candidates_asked_for_with_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two ranks would evaluate with the same noise, on other starts."""
    data = OffPolicyDataModule("Pendulum-v1", eval_episodes=2, eval_candidates=5, eval_selector="both")
    module = OffPolicyModule(3, 1, partial(QSM, hidden=(8,), time_dim=4, T=2))
    data.trainer = cast(Any, SimpleNamespace(lightning_module=module))
    asked: list[tuple[str, int]] = []
    seeds: list[tuple[int, int]] = []

    def episodes(env: Any, policy: Any, env_seed: int, noise_seed: int, each_step: Any) -> dict[str, torch.Tensor]:
        seeds.append((env_seed, noise_seed))
        return {"return": torch.zeros(1), "length": torch.ones(1)}

    monkeypatch.setattr(QSM, "evaluation_policy", lambda self, *how: asked.append(how))
    monkeypatch.setattr("qsm_lightning.datamodule.run_episodes", episodes)
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [mine])
    monkeypatch.setattr(Ranks, "highest", lambda self, *numbers: numbers)
    data.ranks.count = 2
    for data.ranks.rank in (0, 1):
        data.evaluate()
    assert asked == [("sample", 5), ("best_of_n", 5)] * 2
    first, other = set(seeds[:2]), set(seeds[2:])
    assert len(first) == len(other) == 1, "both selectors on the same starts"
    assert len({seed for pair in first | other for seed in pair}) == 4


def test_no_environment_of_evaluation_starts_as_one_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeds that reach gymnasium's reset, copy by copy: the same at every evaluation, none of them training's."""
    seen: list[tuple[bool, int]] = []
    evaluating = False
    reset, evaluate = PendulumEnv.reset, OffPolicyDataModule.evaluate

    def spy(self: PendulumEnv, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            seen.append((evaluating, seed))
        return reset(self, seed=seed, options=options)

    def marked(self: OffPolicyDataModule) -> Any:
        nonlocal evaluating
        evaluating = True
        out = evaluate(self)
        evaluating = False
        return out

    monkeypatch.setattr(PendulumEnv, "reset", spy)
    monkeypatch.setattr(OffPolicyDataModule, "evaluate", marked)
    data = OffPolicyDataModule("Pendulum-v1", 3, None, 60, 40, 8, eval_every_frames=30, eval_episodes=4)
    module = OffPolicyModule(3, 1, partial(QSM, hidden=(8,), time_dim=4, T=2))
    quiet_trainer(tmp_path).fit(module, data)
    training = {seed for evaluating, seed in seen if not evaluating}
    evaluation = {seed for evaluating, seed in seen if evaluating}
    assert len(training) == 3
    assert len(evaluation) == 4, "two evaluations by two selectors from the same four starts"
    assert not training & evaluation
