"""The QSM loss where it is known in closed form, and the properties that make it QSM."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, cast

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from qsm_lightning.errors import SettingError
from qsm_lightning.losses import ALGORITHMS, QSM, OffPolicyLoss, QSMLoss
from qsm_lightning.losses.base import polyak_update
from qsm_lightning.messages import loss_settings
from qsm_lightning.policy import BestOfNPolicy, DiffusionPolicy, ExplorationPolicy, Policy
from qsm_lightning.sampler import reverse_process
from qsm_lightning.schedule import NoiseSchedule
from tests.helpers import replay_batch

B, OBS, A = 32, 3, 2
SMALL = {"hidden": (16, 16), "time_dim": 8}


class Quadratic(nn.Module):
    """Critics Q_i = -|a - best_i|^2 / 2 + offset_i, with grad_a Q_i = best_i - a."""

    def __init__(self, best: list[float], offset: list[float]) -> None:
        super().__init__()
        self.best = nn.Parameter(torch.tensor(best)[:, None, None])
        self.offset = nn.Parameter(torch.tensor(offset)[:, None])

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return -(action - self.best).square().sum(-1) / 2 + self.offset


class Flat(nn.Module):
    """Critics of 1 everywhere."""

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return 1 + 0 * torch.stack([action, action]).sum(-1)


class Linear(nn.Module):
    """A denoiser eps = w a_t with one weight."""

    action_dim = A

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, observation: Tensor, action: Tensor, t: Tensor) -> Tensor:
        return self.w * action


def quadratic_loss(**settings: object) -> QSMLoss:
    critics = Quadratic([0.5, -0.2], [0.0, 3.0])
    settings = {"m_q": 7.0} | settings
    return QSMLoss(Linear(0.4), critics, NoiseSchedule("vp", 5), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("score_at", ["noisy", "clean", "denoised"])
@pytest.mark.parametrize("q_grad", ["mean", "min_q", "target_mean"])
@pytest.mark.parametrize("bc_coef", [0.0, 0.3])
def test_score_matching_with_quadratic_critics_in_closed_form(
    bc_coef: float, score_at: Literal["noisy", "clean", "denoised"], q_grad: Literal["mean", "min_q", "target_mean"]
) -> None:
    torch.manual_seed(0)
    loss = quadratic_loss(score_at=score_at, q_grad=q_grad, bc_coef=bc_coef)
    loss.target_critics = Quadratic([0.9, -0.1], [0.0, 3.0])
    action, noise, t = torch.rand(B, A) * 2 - 1, torch.randn(B, A), torch.randint(5, (B,))
    abar = torch.exp(torch.cumsum(torch.log(loss.schedule.alphas), 0))[t, None]
    noisy = abar.sqrt() * action + (1 - abar).sqrt() * noise
    alpha = loss.schedule.alphas[t, None]
    denoised = (noisy - (1 - alpha) / (1 - abar).sqrt() * 0.4 * noisy) / alpha.sqrt()
    at = {"noisy": noisy, "clean": action, "denoised": denoised.clamp(-1, 1)}[score_at]
    # the first critic is smaller everywhere in reach: -|a - .5|^2/2 < 3 - |a + .2|^2/2
    best = {"mean": 0.15, "min_q": 0.5, "target_mean": 0.4}[q_grad]
    expected_g = best - at
    residual = 0.4 * noisy + 7.0 * expected_g
    cloned = 0.4 * noisy - noise
    value, eps, g, _ = loss.score_matching(torch.zeros(B, OBS), action, t, noise)
    torch.testing.assert_close(g, expected_g)
    torch.testing.assert_close(eps, 0.4 * noisy)
    torch.testing.assert_close(value, residual.square().mean() + bc_coef * cloned.square().mean())
    value.backward()
    torch.testing.assert_close(loss.denoiser.w.grad, (2 * (residual + bc_coef * cloned) * noisy).mean())


def test_critic_loss_and_gradient_in_closed_form() -> None:
    torch.manual_seed(0)
    loss = quadratic_loss(gamma=0.9)
    batch = replay_batch(B)
    reward, terminated = batch["next", "reward"][:, 0], batch["next", "terminated"][:, 0]
    with torch.random.fork_rng():
        next_action = loss.next_action(batch["next", "observation"])
    # targets are copies: min of the two quadratics, at the same noise
    values = torch.stack([-(next_action - 0.5).square().sum(-1) / 2, -(next_action + 0.2).square().sum(-1) / 2 + 3])
    y = torch.where(terminated, reward, reward + 0.9 * values.min(0).values)
    q = torch.stack([-(batch["action"] - 0.5).square().sum(-1) / 2, -(batch["action"] + 0.2).square().sum(-1) / 2 + 3])
    value, metrics = loss.qvalue_loss(batch)
    torch.testing.assert_close(value, (q[0] - y).square().mean() + (q[1] - y).square().mean())
    expected = {"q_mean": q.mean(), "q_std": q.std(), "td_target_mean": y.mean()}
    expected |= {"q_disagreement": (q[0] - q[1]).abs().mean()}
    torch.testing.assert_close(metrics, expected)
    value.backward()
    torch.testing.assert_close(loss.critics.offset.grad[:, 0], 2 * (q - y).mean(1))  # type: ignore[union-attr, index]


def test_the_actors_metrics_by_hand() -> None:
    loss, batch = quadratic_loss(), replay_batch(B)
    torch.manual_seed(1)
    _, metrics = loss.actor_loss(batch)
    torch.manual_seed(1)
    t = loss.random_steps(batch["action"])
    noisy = loss.schedule.add_noise(batch["action"], t, torch.randn(B, A))
    assert t.unique().tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(metrics["q_grad_norm"], (0.15 - noisy).square().sum(-1).sqrt().mean())
    torch.testing.assert_close(metrics["eps_norm"], (0.4 * noisy).square().sum(-1).sqrt().mean())


def test_the_settings_of_the_sampler_reach_the_policies() -> None:
    torch.manual_seed(0)
    loss = QSM(OBS, A, T=4, temperature=0.3, clip_sampler=False, **SMALL)  # type: ignore[arg-type]
    observation, noise = torch.randn(64, OBS), 0.1 * torch.randn(5, 64, A)  # few actions end at the bounds

    def sampled(temperature: float, clip: bool) -> Tensor:
        steps = reverse_process(
            loss.denoiser, loss.schedule, observation, noise[-1], noise[:-1], temperature=temperature, clip=clip
        )
        return steps[-1].clamp(-1, 1)

    policy = cast(DiffusionPolicy, loss.evaluation_policy())
    with torch.no_grad():
        assert torch.equal(policy.act(observation, noise), sampled(0.3, False))
        assert not torch.equal(sampled(0.3, False), sampled(1.0, False))
        assert not torch.equal(sampled(0.3, False), sampled(0.3, True))


@pytest.mark.parametrize("candidates", [1, 4])
def test_the_next_action_is_that_of_collecting_the_best_sample_and_noise(candidates: int) -> None:
    loss = QSM(OBS, A, action_noise=0.5, candidates=candidates, **SMALL)  # type: ignore[arg-type]
    observation = torch.randn(B, OBS)
    repeated = observation.repeat_interleave(candidates, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        samples = loss.sampler(repeated)
        best = loss.critics(repeated, samples).min(0).values.view(B, candidates).argmax(1)
        expected = samples.view(B, candidates, A)[torch.arange(B), best] + 0.5 * torch.randn(B, A)
    assert len(best.unique()) == candidates
    for act in (loss.next_action, cast(Policy, loss.exploration_policy()).act):
        torch.manual_seed(1)
        assert torch.equal(act(observation), expected.clamp(-1, 1))


@pytest.mark.parametrize("m_q", [7.0, "batch", "auto"])
def test_the_entropy_bonus_by_hand(m_q: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """c tau (H - mean H), tau being sqrt(1 - abar_0) / M_q, and H half the logarithms of variances from two samples."""
    loss, plain = quadratic_loss(m_q=m_q, entropy_bonus=0.4), quadratic_loss()
    if m_q == "auto":
        loss.log_size.data.fill_(math.log(3))
    observation, one, other = torch.randn(B, OBS), 2 * torch.rand(B, A) - 1, 2 * torch.rand(B, A) - 1
    monkeypatch.setattr(loss, "next_action", lambda states: other if states is observation else None)
    beta = 1 - loss.schedule.alphas[0]
    mean = (0.15 - one).abs().mean()
    tau = {7.0: beta.sqrt() / 7, "batch": 0.1 * mean, "auto": beta.sqrt() * mean / 3}[m_q]
    variances = torch.stack([torch.stack([one[b], other[b]]).var(0) for b in range(B)])
    entropy = torch.tensor([sum(0.5 * torch.log(v + 0.01) for v in row) for row in variances])
    expected = plain.next_value(observation, one) + 0.4 * tau * (entropy - entropy.mean())
    torch.testing.assert_close(loss.next_value(observation, one), expected)
    reward, terminated = torch.randn(B), torch.arange(B) % 3 == 0
    y = loss.td_target(reward, terminated, observation, one)
    torch.testing.assert_close(y, torch.where(terminated, reward, reward + 0.99 * expected))


def test_the_entropy_of_a_gaussian_grows_by_log_two_a_component_with_twice_its_deviation() -> None:
    one, other = torch.randn(2, 100_000, A)
    found = [QSM.entropy(std * one, std * other).mean().item() for std in (20.0, 40.0)]
    assert found[1] - found[0] == pytest.approx(A * math.log(2), abs=0.02)
    assert QSM.entropy(one, one)[0].item() == pytest.approx(A * math.log(0.1))


def test_where_q_has_no_slope_there_is_no_entropy_bonus() -> None:
    loss = quadratic_loss(m_q="auto", entropy_bonus=0.4)
    loss.critics = Flat()
    loss.target_critics = Flat()
    assert torch.equal(loss.next_value(torch.randn(B, OBS), torch.rand(B, A)), torch.ones(B))


def test_without_an_entropy_bonus_no_second_sample_is_drawn() -> None:
    loss, before = quadratic_loss(), torch.get_rng_state()
    loss.next_value(torch.zeros(B, OBS), torch.zeros(B, A))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["qsm", "sdac", "td3"])
def test_collecting_has_the_noise_of_the_setting(name: str) -> None:
    sizes: dict[str, Any] = {"hidden": (8,), "action_noise": 0.3}
    policy = cast(ExplorationPolicy, ALGORITHMS[name](OBS, A, **sizes).exploration_policy())
    assert policy.noise_std == 0.3


def test_the_best_of_n_is_chosen_by_the_critics_under_training() -> None:
    loss = QSM(OBS, A, **SMALL)  # type: ignore[arg-type]
    policy = cast(BestOfNPolicy, loss.evaluation_policy("best_of_n", 4))
    assert policy.critics is loss.critics
    assert policy.n == 4


# As docs/baselines.md and docs/algorithm.md have them from the papers and their authors' code.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qsm": {
        **{"hidden": (512, 512), "time_dim": 64, "schedule": "vp", "T": 5, "gamma": 0.99, "tau": 0.005},
        **{"m_q": 50.0, "score_at": "noisy", "q_grad": "mean", "bc_coef": 0.0, "batch_temperature": 0.1},
        **{"m_q_slope": 0.3, "m_q_lr": 3e-3, "temperature": 1.0, "clip_sampler": True, "action_noise": 0.1},
        **{"candidates": 1, "entropy_bonus": 0.0},
    },
    "sac": {"hidden": (512, 512), "gamma": 0.99, "tau": 0.005, "alpha_init": 1.0, "target_entropy": None},
    "td3": {"policy_delay": 2, "policy_noise": 0.2, "noise_clip": 0.5, "action_noise": 0.1, "tau": 0.005},
    "diffusion_ql": {"eta": 200.0, "max_q_backup": 1, "T": 5, "schedule": "vp", "tau": 0.005},
    "sdac": {"entropy_coef": 5.0, "reverse_samples": 64, "candidates": 4, "T": 5, "action_noise": 0.1},
    "dacer": {
        **{"alpha_init": 3.0, "alpha_lr": 3e-2, "alpha_every": 10_000, "entropy_samples": 200, "policy_delay": 2},
        "target_entropy": None,
    },
    "cqsm": {
        **{"regularization": 0.1, "discount_rate": 0.2, "tau": 0.005, "max_speed": 20.0, "sigma": 0.5},
        **{"evaluation": "orthogonality", "window": 1, "trace_rate": 1.0},
    },
    "cqsm_diffusion": {"regularization": 0.02, "discount_rate": 0.2, "score_at": "noisy", "tau": 0.005},
}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_settings_that_are_not_given_are_the_documented_ones(name: str) -> None:
    found = loss_settings(ALGORITHMS[name])
    assert {setting: found[setting] for setting in DEFAULTS[name]} == DEFAULTS[name]
    assert ALGORITHMS[name].actor_lr_decay_updates == (2_000_000 if "qsm" in name else 0)
    assert ALGORITHMS[name].selectors == (("sample",) if name in ("sac", "td3", "cqsm") else ("sample", "best_of_n"))


def test_gradient_step_moves_actions_uphill() -> None:
    """The sign of the target: with eps = -M_q grad Q, a denoising step raises Q from anywhere."""
    loss = quadratic_loss(q_grad="min_q")
    observation, action = torch.zeros(9, OBS), torch.linspace(-1, 1, 9)[:, None].expand(9, A)
    g = loss.q_gradient(observation, action)
    eps = -0.1 * g  # what the regression is fitted to, with a small M_q
    stepped = action - loss.schedule.eps_coefs[0] * eps
    q = loss.critics(observation, stepped)[0]
    q_before = loss.critics(observation, action)[0]
    assert (q >= q_before).all()
    assert (q > q_before)[(action - 0.5).abs().amax(-1) > 1e-6].all()
    value, *_ = loss.score_matching(observation, action, torch.zeros(9, dtype=torch.long), torch.zeros(9, A))
    at_optimum = copy.deepcopy(loss)
    at_optimum.denoiser.forward = lambda o, a, t: -7.0 * (0.5 - a)  # type: ignore[method-assign, assignment]
    optimum, *_ = at_optimum.score_matching(observation, action, torch.zeros(9, dtype=torch.long), torch.zeros(9, A))
    assert optimum.item() < 1e-10 < value.item()


def test_truncation_bootstraps_and_termination_does_not() -> None:
    loss = QSM(OBS, A, **SMALL)  # type: ignore[arg-type]
    next_observation, next_action = torch.randn(2, OBS), torch.rand(2, A)
    y = loss.td_target(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), next_observation, next_action)
    assert y[0] == 1.0
    expected = 1 + 0.99 * loss.target_critics(next_observation, next_action).min(0).values[1]
    torch.testing.assert_close(y[1], expected)
    # `done` plays no part: a batch whose frames are all truncated has the same loss as one whose frames go on
    batch = replay_batch()
    batch["next", "terminated"][:] = False
    losses = []
    for done in (True, False):
        batch["next", "done"][:] = done
        torch.manual_seed(1)
        losses.append(loss(batch)["loss_qvalue"])
    assert torch.equal(*losses)


def test_a_nan_after_termination_does_not_reach_the_target() -> None:
    loss = QSM(OBS, A, **SMALL)  # type: ignore[arg-type]
    y = loss.td_target(torch.zeros(1), torch.tensor([True]), torch.full((1, OBS), torch.nan), torch.zeros(1, A))
    assert y.item() == 0


@pytest.mark.parametrize(
    ("term", "trained", "untouched"), [("qvalue", "critics", "denoiser"), ("actor", "denoiser", "critics")]
)
def test_gradients_are_isolated(term: str, trained: str, untouched: str) -> None:
    loss = QSM(OBS, A, **SMALL)  # type: ignore[arg-type]
    value, metrics = loss.term_loss(term, replay_batch())
    value.backward()
    assert all(p.grad is not None and p.grad.any() for p in getattr(loss, trained).parameters())
    assert all(p.grad is None for p in getattr(loss, untouched).parameters())
    assert all(p.grad is None for p in loss.target_critics.parameters())
    assert not any(value.requires_grad for value in metrics.values())
    assert [*loss.term_modules(term)] == [getattr(loss, trained)]


def test_inputs_and_parameters_are_not_mutated() -> None:
    loss, batch = QSM(OBS, A, **SMALL), replay_batch()  # type: ignore[arg-type]
    before, weights = batch.clone(), {k: v.clone() for k, v in loss.state_dict().items()}
    loss(batch)
    assert (batch == before).all()
    assert set(batch.keys(True)) == set(before.keys(True))
    assert all(torch.equal(v, weights[k]) for k, v in loss.state_dict().items())


def test_time_indices_cover_the_schedule_uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, seen = QSM(OBS, A, T=4, **SMALL), []  # type: ignore[arg-type]
    original = QSMLoss.score_matching

    def spy(self: QSMLoss, observation: Tensor, action: Tensor, t: Tensor, noise: Tensor) -> Any:
        seen.append(t)
        return original(self, observation, action, t, noise)

    monkeypatch.setattr(QSMLoss, "score_matching", spy)
    torch.manual_seed(0)
    loss.actor_loss(replay_batch(4000))
    counts = torch.cat(seen).bincount(minlength=4)
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 150


def test_targets_follow_by_polyak() -> None:
    loss = QSM(OBS, A, tau=0.25, **SMALL)  # type: ignore[arg-type]
    for p in loss.critics.parameters():
        p.data += 1
    expected = [
        0.75 * t + 0.25 * p for t, p in zip(loss.target_critics.parameters(), loss.critics.parameters(), strict=True)
    ]
    loss.update_targets()
    for target, value in zip(loss.target_critics.parameters(), expected, strict=True):
        torch.testing.assert_close(target.data, value.data)
        assert not target.requires_grad
    polyak_update(loss.critics, loss.target_critics, 1.0)
    assert all(map(torch.equal, loss.critics.parameters(), loss.target_critics.parameters()))


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if not name.startswith("cqsm")])
def test_it_is_a_torchrl_loss_module(name: str) -> None:
    """It reads its ``in_keys`` and no others, whatever they are called, and leaves the batch as it was."""
    if name == "dacer":
        pytest.importorskip("sklearn")
    few: dict[str, Any] = {"entropy_samples": 5} if name == "dacer" else {}
    loss = cast(Any, ALGORITHMS[name])(OBS, A, hidden=(16,), **few)
    batch = replay_batch()
    before = batch.clone()

    def seeded(batch: TensorDict) -> TensorDictBase:
        torch.manual_seed(0)
        return loss(batch.select(*loss.in_keys, strict=True))

    out = seeded(batch)
    assert set(loss.out_keys) <= set(out.keys())
    assert out.batch_size == torch.Size([])
    assert (batch == before).all()
    renamed = batch.rename_key_("action", "a").rename_key_("observation", "o")
    for key, name in {"observation": "o", "reward": "r", "terminated": "t"}.items():
        renamed["next"].rename_key_(key, name)
    loss.set_keys(action="a", observation="o", reward="r", terminated="t")
    assert set(loss.in_keys) == {"a", "o", ("next", "o"), ("next", "r"), ("next", "t")}
    assert (seeded(renamed) == out).all()
    assert isinstance(loss, OffPolicyLoss)


def test_the_noise_of_the_target_does_not_depend_on_torchrls_exploration_type() -> None:
    """TorchRL runs losses under DETERMINISTIC; the reverse process and the 0.1 noise must stay random."""
    loss, observation = QSM(OBS, A, **SMALL), torch.zeros(500, OBS)  # type: ignore[arg-type]
    with torch.no_grad():
        loss.denoiser.trunk.layers[-1].weight.zero_()  # type: ignore[union-attr, operator]
        loss.temperature = 0.0
        torch.manual_seed(0)
        inside = loss.next_action(observation)
    assert inside.std() > 0.1
    before = torch.get_rng_state()
    loss.qvalue_loss(replay_batch())
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "setting",
    [
        {"T": 0},
        {"hidden": ()},
        {"hidden": (16, 0)},
        {"hidden": (8, 10**12)},
        {"T": 10**11},
        {"time_dim": 7},
        {"gamma": 1.5},
        {"tau": 0},
        {"m_q": 0},
        {"score_at": "dirty"},
        {"q_grad": "max"},
        {"temperature": -1},
        {"action_noise": -1},
        {"candidates": 0},
        {"entropy_bonus": -1},
        {"schedule": "sine"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        QSM(OBS, A, **setting)  # type: ignore[arg-type]
