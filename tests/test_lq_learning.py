"""Linear-quadratic control learned by CQSM: against the closed form, in ever shorter time steps, and ``qsm-lq``."""

from __future__ import annotations

import importlib.util
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from qsm_lightning.commands import lq as command
from qsm_lightning.errors import SettingError
from qsm_lightning.theory.learning import (
    FAR,
    SECONDS,
    Errors,
    Learned,
    QuadraticCritic,
    _loss,
    _Paths,
    errors_of,
    learn,
)
from qsm_lightning.theory.lq import LinearQuadratic, Solution, four_dimensional, scalar
from qsm_lightning.theory.lq_picture import draw_time_steps
from qsm_lightning.theory.lq_steps import discrete_policy_iteration
from qsm_lightning.theory.time_steps import CONTINUOUS, DISCRETE, Point, measure

EXAMPLES = [pytest.param(scalar(), id="scalar"), pytest.param(four_dimensional(), id="four")]
on_examples = pytest.mark.parametrize("problem", EXAMPLES)
STEPS = [Fraction(1, 5 * 2**k) for k in range(7)]


def holding(problem: LinearQuadratic, solution: Solution) -> Learned:
    """What would be learned if it were ``solution``."""
    loss = _loss(problem, problem.beta, "quadratic")
    weights = {"root": torch.from_numpy(solution.P / 2), "c": torch.tensor([solution.c])}
    loss.critics.load_state_dict(weights)
    loss.score.load_state_dict({"weight": torch.from_numpy(-solution.K)})
    return Learned(loss)


# What is learned with, and how it is measured.


def test_the_quadratic_critic() -> None:
    critic = QuadraticCritic(3)
    assert critic(torch.ones(4, 2), torch.ones(4, 1)).tolist() == [[0.0] * 4]
    critic = critic.double()
    root = np.random.default_rng(0).normal(size=(3, 3))
    with torch.no_grad():
        critic.root.copy_(torch.from_numpy(root))
        critic.c.fill_(0.3)
    P = critic.P.detach().numpy()
    assert np.array_equal(P, root + root.T)
    z = np.random.default_rng(1).normal(size=(5, 7, 3))
    found = critic(*torch.from_numpy(z).split([2, 1], -1)).detach().numpy()
    assert np.allclose(found, [0.3 - np.einsum("...i,ij,...j->...", z, P, z) / 2])


@on_examples
def test_errors_are_those_of_points_in_the_long_run(problem: LinearQuadratic) -> None:
    best, other = problem.optimal(), problem.evaluate(0.8 * problem.optimal().K)
    found = errors_of(problem, other, best)
    z = np.random.default_rng(1).multivariate_normal(np.zeros(len(best.P)), problem.stationary(best.K), 200_000)
    P_error = np.abs(other.P - best.P).max() / np.abs(best.P).max()
    expected = [
        np.sqrt(((other.value(z) - best.value(z)) ** 2).mean() / (best.value(z) ** 2).mean()),
        np.sqrt(((other.score(z) - best.score(z)) ** 2).sum() / (best.score(z) ** 2).sum()),
        other.value(z).mean() / best.value(z).mean(),
    ]
    assert pytest.approx(P_error) == found.P
    assert [found.q, found.score, found.q_mean] == pytest.approx(expected, rel=0.01)
    drawn = holding(problem, other).errors(problem, best)
    assert pytest.approx(P_error) == drawn.P
    assert [drawn.q, drawn.score, drawn.q_mean] == pytest.approx(expected, rel=0.03)
    assert errors_of(problem, best, best) == Errors(0, 0, 0, 1)
    assert np.isnan(Learned(_loss(problem, 1.0, "mlp")).errors(problem, best).P)


@on_examples
def test_frames_are_euler_steps_twice_with_opposite_noise(problem: LinearQuadratic) -> None:
    torch.manual_seed(0)
    dt, count, (n, m) = 0.02, 20_000, problem.B.shape
    loss = _loss(problem, problem.beta, "mlp")
    paths = _Paths(problem, dt, count)
    frames, following = paths.step(loss), paths.step(loss)
    z, psi, after = (frames[key].numpy() for key in ("observation", "action", ("next", "observation")))
    assert z.shape == after.shape == (2 * count, n + m)
    assert np.array_equal(z[:count], z[count:])
    assert np.allclose(psi, loss.velocity(torch.from_numpy(z)).detach().numpy())
    drift = np.hstack([z[:, :n] @ problem.A.T + z[:, n:] @ problem.B.T, psi])
    noise = after - z - drift * dt
    assert np.allclose(noise[:count], -noise[count:])
    covariance = problem.Sigma @ problem.Sigma.T * dt
    spread = noise[:count].T @ noise[:count] / count
    assert np.allclose(spread, covariance, atol=0.05 * covariance.max())
    paid = frames["next", "reward"].numpy()[:, 0]
    assert np.allclose(paid, problem.reward_rate(z, np.zeros_like(psi)) * dt), "the score is paid for in the loss"
    assert (frames["next", "time_step"] == dt).all()
    assert not frames["next", "terminated"].any()
    went_on = (following["observation"][:count] == frames["next", "observation"][:count]).all(1).double().mean()
    assert float(1 - went_on) == pytest.approx(dt / SECONDS, rel=0.3)


def test_paths_begin_in_the_long_run_and_end_far_out() -> None:
    torch.manual_seed(0)
    problem = four_dimensional()
    paths, loss = _Paths(problem, 0.02, 20_000), _loss(problem, problem.beta, "quadratic")
    covariance = problem.stationary(problem.optimal().K)
    assert np.allclose(np.cov(paths.z.numpy().T), covariance, atol=0.05 * covariance.max())
    paths.z[::2, 1] = 2 * FAR * np.sqrt(covariance[1, 1])
    paths.step(loss)
    assert (paths.z[:, 1].abs() < FAR * np.sqrt(covariance[1, 1])).all()


def test_learning_leaves_the_generator_and_repeats_itself() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (learn(scalar(), 0.05, updates=20, particles=32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    states = [learned.loss.state_dict() for learned in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["score.weight"], states[2]["score.weight"])


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_few_updates_are_averaged_too(updates: int) -> None:
    loss = learn(scalar(), 0.05, updates=updates, particles=16).loss
    assert all((parameter != 0).any() for parameter in loss.critics.parameters()), "they begin at 0"


# Against the closed form.


@pytest.mark.parametrize(
    ("problem", "updates"),
    [
        pytest.param(scalar(), 1500, id="scalar"),
        pytest.param(four_dimensional(), 3000, id="four", marks=pytest.mark.slow),
    ],
)
def test_the_closed_form_of_continuous_time_is_learned(problem: LinearQuadratic, updates: int) -> None:
    errors = learn(problem, 1 / 320, updates=updates).errors(problem, problem.optimal())
    assert errors.P < 0.02
    assert errors.q < 0.02
    assert errors.score < 0.05
    assert errors.q_mean == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "updates"),
    [pytest.param(scalar(), 3000, id="scalar"), pytest.param(four_dimensional(), 6000, id="four")],
)
def test_networks_learn_it_without_knowing_its_form(problem: LinearQuadratic, updates: int) -> None:
    """The discretised fixed point is 2 % from it in scalar, and 4 % in four."""
    learned = learn(problem, 1 / 40, critic="mlp", updates=updates, learning_rate=0.003)
    errors = learned.errors(problem, problem.optimal())
    assert max(errors.q, errors.score) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("method", [CONTINUOUS, DISCRETE])
@pytest.mark.parametrize("dt", [Fraction(1, 20), Fraction(1, 160)], ids=str)
@on_examples
def test_each_method_learns_its_fixed_point(problem: LinearQuadratic, dt: Fraction, method: str) -> None:
    """Gamma was set for steps of 1/10."""
    beta = problem.beta if method == CONTINUOUS else problem.beta * float(Fraction(1, 10) / dt)
    fixed = discrete_policy_iteration(problem, float(dt), np.exp(-beta * float(dt)))
    errors = learn(problem, float(dt), beta=beta).errors(problem, fixed)
    assert max(errors.P, errors.q, errors.score) < 0.02


# The time step.


@on_examples
def test_shorter_steps_help_cqsm_and_ruin_a_fixed_gamma(problem: LinearQuadratic) -> None:
    points = measure(problem, STEPS, Fraction(1, 20))
    assert [(point.method, point.dt) for point in points] == [(m, dt) for dt in STEPS for m in (CONTINUOUS, DISCRETE)]
    exact = {(point.method, point.dt): point.exact for point in points}
    assert exact[CONTINUOUS, STEPS[2]] == exact[DISCRETE, STEPS[2]], "where gamma was set they are one method"
    for quantity in ("q", "score"):
        for method in (CONTINUOUS, DISCRETE):
            errors = [getattr(exact[method, dt], quantity) for dt in STEPS[2:]]
            slope = np.polyfit(np.log([float(dt) for dt in STEPS[2:]]), np.log(errors), 1)[0]
            assert 0.9 < slope < 1.1 if method == CONTINUOUS else slope < -0.5
        assert getattr(exact[CONTINUOUS, STEPS[-1]], quantity) < 0.01
        assert getattr(exact[DISCRETE, STEPS[-1]], quantity) > 0.8
    for dt in STEPS[2:]:
        assert exact[CONTINUOUS, dt].q_mean == pytest.approx(1, abs=0.08)  # type: ignore[union-attr]
    ratio = exact[DISCRETE, STEPS[-1]].q_mean / exact[DISCRETE, STEPS[-2]].q_mean  # type: ignore[union-attr]
    assert ratio == pytest.approx(0.5, abs=0.05), "Q is worth of some steps, whatever time they take"


def test_gamma_set_for_a_step_is_a_discount_rate_at_another() -> None:
    told: list[Point] = []
    points = measure(scalar(), STEPS[3:4], Fraction(1, 10), updates=5, seed=4, tell=told.append)
    assert told == points
    dt, gamma = 1 / 40, np.exp(-scalar().beta / 10)
    assert [point.beta for point in points] == pytest.approx([scalar().beta, -np.log(gamma) / dt])
    fixed = discrete_policy_iteration(scalar(), dt, float(gamma))
    assert points[1].exact is not None
    assert pytest.approx(errors_of(scalar(), fixed, scalar().optimal()).P) == points[1].exact.P
    learned = learn(scalar(), dt, beta=points[1].beta, updates=5, seed=4)
    assert points[1].learned == learned.errors(scalar(), scalar().optimal())


# The command.


def computed(folder: Path, *args: str) -> dict[str, Any]:
    command.run([*args, "--out", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == ["lq.json", "lq.png"]
    assert (folder / "lq.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "lq.json").read_text())


def test_the_exact_fixed_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = computed(tmp_path / "deep" / "out", "--updates", "0")
    assert (found["problem"], found["set_at"], found["updates"]) == ("scalar", "1/20", 0)
    points = measure(scalar(), STEPS, Fraction(1, 20))
    assert len(points) == len(found["points"]) == 14
    printed = capsys.readouterr()
    assert printed.err == ""
    for row, point in zip(found["points"], points, strict=True):
        assert (row["dt"], row["method"], row["learned"]) == (str(point.dt), point.method, None)
        assert point.exact is not None
        assert row["exact"]["q"] == pytest.approx(point.exact.q)
        cells = f"{point.exact.q:.4f} | {point.exact.score:.4f} | {point.exact.q_mean:.4f}"
        assert f"| {point.dt} | {point.method} | {cells} |" in printed.out
    assert f"{tmp_path}/deep/out/lq.png" in printed.out


def test_its_settings_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--problem", "four", "--steps", "0.025,1/8,1/40", "--set-at", "0.125", "--updates", "5", "--seed"]
    found = computed(tmp_path / "out", *args, "3")
    printed = capsys.readouterr()
    dts = [(row["dt"], row["method"]) for row in found["points"]]
    assert dts == [("1/8", CONTINUOUS), ("1/8", DISCRETE), ("1/40", CONTINUOUS), ("1/40", DISCRETE)]
    learned = learn(four_dimensional(), 1 / 40, updates=5, seed=3).errors(
        four_dimensional(), four_dimensional().optimal()
    )
    assert found["points"][2]["learned"]["score"] == pytest.approx(learned.score)
    assert f"| {learned.q:.4f} |" in printed.out
    assert printed.err.count("\n") == 4
    assert f"dt 1/40, {CONTINUOUS}: error of Q {learned.q:.4f}" in printed.err
    assert computed(tmp_path / "out", *args, "3") == found
    assert computed(tmp_path / "out", *args, "4")["points"] != found["points"]


def test_what_is_infinite_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = computed(tmp_path, "--steps", "1,1/20", "--updates", "2")
    assert [row["exact"] is None for row in found["points"]] == [True, True, False, False]
    assert [row["learned"] is None for row in found["points"]] == [True, True, False, False]
    out = capsys.readouterr().out
    assert "| 1 | CQSM |  |  |  |  |  |  |" in out
    assert "CQSM at dt 1 is left out: no finite value was found" in out
    computed(tmp_path, "--steps", "1", "--updates", "2")


def test_the_picture_shows_the_points() -> None:
    points = measure(scalar(), STEPS[1:4], Fraction(1, 20), updates=2)
    figure = draw_time_steps(points, Fraction(1, 20))
    titles = {"q_mean": "mean Q / exact mean Q", "q": "relative error of Q", "score": "relative error of the score"}
    for axis, (quantity, title) in zip(figure.axes, titles.items(), strict=True):
        assert isinstance(axis, Axes)
        assert axis.get_title() == title
        assert axis.xaxis_inverted()
        assert sorted(label.get_text() for label in axis.get_xticklabels()) == ["1/10", "1/20", "1/40"]
        lines = {str(line.get_label()): line for line in axis.get_lines()}
        for method in (CONTINUOUS, DISCRETE):
            for kind, name in (("exact", "exact fixed point"), ("learned", "learned")):
                expected = [getattr(getattr(point, kind), quantity) for point in points if point.method == method]
                assert np.allclose(np.asarray(lines[f"{method}, {name}"].get_ydata(), float), expected)


def test_bad_input_ends_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for args, words in [
        (["--steps", "a"], "--steps: 'a' is not a time step such as 1/20 or 0.05"),
        (["--steps", "1/5,"], "--steps: '' is not a time step"),
        (["--steps", "1/0"], "--steps: '1/0' is not a time step"),
        (["--steps", "nan"], "--steps: 'nan' is not a time step"),
        (["--steps", "1e999999999"], "--steps: '1e999999999' is not a time step"),
        (["--steps", "1/5,0"], "--steps has 0: it must be from 1/10000 to 1"),
        (["--steps", "2"], "--steps has 2"),
        (["--steps=-1/5"], "--steps has -1/5"),
        (["--steps", ",".join(f"1/{k}" for k in range(1, 22))], "--steps has 21 time steps: give at most 20"),
        (["--set-at", "0"], "--set-at has 0: it must be from 1/10000 to 1"),
        (["--set-at", "x"], "--set-at: 'x' is not a time step"),
        (["--problem", "five"], "--problem: invalid choice: 'five'"),
        (["--updates", "-1"], "--updates is -1: it must not be negative"),
        (["--updates", "1.5"], "--updates: invalid int value: '1.5'"),
        (["--seed", "-1"], "--seed is -1: it must be from 0"),
        (["--seed", str(2**63)], "--seed is .*: it must be from 0"),
        (["--out", str(tmp_path / "file")], "--out is .*choose another folder"),
    ]:
        with pytest.raises(SettingError, match=words) as error:
            command.run(["--out", str(tmp_path / "out"), *args])
        assert "\n" not in str(error.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"qsm-lq: scipy is not installed; pip install 'qsm-lightning\[theory\]'"):
        command.run(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_main_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--updates", "-1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "qsm-lq: --updates is -1: it must not be negative\n"
