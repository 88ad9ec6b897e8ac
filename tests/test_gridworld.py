"""The tabular iteration: exact values, what provably improves, what is equal at the end; and ``qsm-gridworld``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsm_lightning.commands import gridworld as command
from qsm_lightning.errors import SettingError
from qsm_lightning.theory.gridworld import (
    MAP,
    Gridworld,
    action_gradient,
    action_values,
    entropy,
    evaluate,
    improve,
    policy_iteration,
    random_policy,
    reaches_goal,
    read_map,
    transitions,
)
from qsm_lightning.theory.gridworld_picture import draw_gridworld

RIGHT, LEFT, UP, DOWN = range(4)
OTHER = "#..\n...\n.#.\n.#G\n"  # with a dead end


@pytest.fixture(params=[MAP, OTHER], ids=["shipped", "other"])
def world(request: pytest.FixtureRequest) -> Gridworld:
    return read_map(request.param)


def state(world: Gridworld, row: int, column: int) -> int:
    return world.cells.tolist().index([row, column])


# The map.


def test_moves_by_hand() -> None:
    world = read_map(OTHER)
    assert len(world.cells) == 9
    corner = state(world, 0, 1)
    assert world.next[corner, RIGHT] == state(world, 0, 2)
    assert world.next[corner, LEFT] == corner, "a wall"
    assert world.next[corner, UP] == corner, "the border"
    assert world.next[corner, DOWN] == state(world, 1, 1)
    assert (world.next[world.goal] == world.goal).all()
    above = state(world, 2, 2)
    assert world.reward[above].tolist() == [0, 0, 0, 1]
    assert world.reward.sum() == 1 + 4


def test_a_map_may_be_indented_and_end_in_any_way() -> None:
    assert np.array_equal(read_map("\n  .G\n  ..  \n").next, read_map(".G\n..").next)


# Evaluation.


@pytest.mark.parametrize("bonus", [0.0, 0.7])
def test_the_value_of_a_corridor_in_closed_form(bonus: float) -> None:
    """From the one cell the goal is entered with probability p: V = p (1 + g V_goal) + (1 - p) g V + bonus H."""
    world, g = read_map(".G", 0.9), 0.9
    log_policy = improve(np.array([[1.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]]), 1.0)
    p, (h, h_goal) = float(np.exp(log_policy[0, RIGHT])), entropy(log_policy)
    assert h_goal == pytest.approx(np.log(4))
    goal = (1 + bonus * h_goal) / (1 - g)
    expected = (p * (1 + g * goal) + bonus * h) / (1 - (1 - p) * g)
    assert evaluate(world, log_policy, bonus) == pytest.approx(np.array([expected, goal]), rel=1e-12)


@pytest.mark.parametrize("bonus", [0.0, 2.0])
def test_the_value_is_the_sum_of_discounted_gains(world: Gridworld, bonus: float) -> None:
    """Followed step by step from each cell, with no matrix."""
    log_policy = random_policy(world, seed=3)
    probability, discount = np.exp(log_policy), 1.0
    place, total = np.eye(len(world.cells)), np.zeros(len(world.cells))
    for _ in range(800):
        for s in range(len(world.cells)):
            gain = sum(probability[s, a] * (world.reward[s, a] - bonus * log_policy[s, a]) for a in range(4))
            total += discount * place[:, s] * gain
        after = np.zeros_like(place)
        for a in range(4):
            for s in range(len(world.cells)):
                after[:, world.next[s, a]] += place[:, s] * probability[s, a]
        place, discount = after, discount * world.gamma
    assert evaluate(world, log_policy, bonus) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("bonus", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 0.95, 0.999])
def test_the_bellman_equation_holds(world: Gridworld, bonus: float, gamma: float) -> None:
    world = Gridworld(world.cells, world.goal, world.next, world.reward, gamma)
    log_policy = random_policy(world)
    value = evaluate(world, log_policy, bonus)
    again = (np.exp(log_policy) * (action_values(world, value) - bonus * log_policy)).sum(-1)
    assert np.abs(value - again).max() < 1e-10 * max(1, value.max())


def test_a_sharp_policy_counts_steps() -> None:
    """Greedy in the distance, V = gamma^(d - 1) / (1 - gamma) with d steps to the goal."""
    world = read_map(OTHER, 0.9)
    last = policy_iteration(world, 1000.0)[-1]
    for (row, column), steps in {(2, 2): 1, (1, 2): 2, (0, 1): 4, (3, 0): 6}.items():
        assert last.value[state(world, row, column)] == pytest.approx(0.9 ** (steps - 1) / 0.1, rel=1e-9)


# The iteration.


def test_improvement_is_a_softmax() -> None:
    q = np.array([[1.0, 2.0, 3.0, -1.0]])
    weights = np.exp(2 * q)
    assert np.exp(improve(q, 2.0)) == pytest.approx(weights / weights.sum())
    assert np.isfinite(improve(1e6 * q, 1e3)).all()


def test_the_soft_value_improves_in_every_state_every_round(world: Gridworld) -> None:
    """By what KL(pi_k || pi_k+1) / alpha, met on the way of the new policy, comes to."""
    for alpha in (0.1, 1.0, 10.0, 100.0):
        for seed in range(3):
            found = policy_iteration(world, alpha, soft=True, seed=seed)
            assert found[-1].is_fixed(alpha)
            for before, after in zip(found, found[1:], strict=False):
                gain, scale = after.soft_value - before.soft_value, after.soft_value.max()
                assert gain.min() > -1e-12 * scale
                divergence = (np.exp(before.log_policy) * (before.log_policy - after.log_policy)).sum(-1)
                visits = np.linalg.inv(np.eye(len(gain)) - world.gamma * transitions(world, after.log_policy))
                assert gain == pytest.approx(visits @ divergence / alpha, rel=1e-9, abs=1e-11 * scale)


def test_the_soft_fixed_point_is_that_of_soft_value_iteration(world: Gridworld) -> None:
    """V = logsumexp(alpha Q) / alpha."""
    value = np.zeros(len(world.cells))
    for _ in range(1000):
        value = np.log(np.exp(2 * (action_values(world, value))).sum(-1)) / 2
    assert policy_iteration(world, 2.0, soft=True)[-1].soft_value == pytest.approx(value, rel=1e-12)


def test_the_plain_iteration_does_not_improve_every_round() -> None:
    """Neither value, on the shipped map; this is why the other is there."""
    found = policy_iteration(read_map(MAP), 1.0)
    gains = [after.value - before.value for before, after in zip(found, found[1:], strict=False)]
    soft_gains = [after.soft_value - before.soft_value for before, after in zip(found, found[1:], strict=False)]
    assert min(gain.min() for gain in gains) < -1
    assert min(gain.min() for gain in soft_gains) < -0.1


@pytest.mark.parametrize("soft", [False, True])
def test_the_score_is_alpha_times_the_q_gradient_at_the_fixed_point(world: Gridworld, soft: bool) -> None:
    for alpha in (0.1, 1.0, 10.0, 100.0):
        found = policy_iteration(world, alpha, soft)
        first, last = found[0], found[-1]
        assert abs(first.cosine) < 0.5
        assert first.distance(alpha) > 0.5
        assert last.score == pytest.approx(alpha * last.q_gradient, rel=1e-7, abs=1e-8)
        assert last.cosine == pytest.approx(1, abs=1e-12)
        assert last.distance(alpha) < 1e-8
        assert [r.is_fixed(alpha) for r in found] == [False] * (len(found) - 1) + [True]
        again = policy_iteration(world, alpha, soft, seed=1)[-1]
        assert again.log_policy == pytest.approx(last.log_policy, rel=1e-6, abs=1e-6), "from any start"


def test_a_new_score_is_alpha_times_the_last_q_gradient() -> None:
    found = policy_iteration(read_map(MAP), 3.0, rounds=4)
    assert len(found) == 5
    for before, after in zip(found, found[1:], strict=False):
        assert after.score == pytest.approx(3 * before.q_gradient, abs=1e-12)


def test_differences_over_opposite_actions() -> None:
    assert action_gradient(np.array([[5.0, 1.0, 2.0, 8.0]])).tolist() == [[2.0, -3.0]]


@pytest.mark.parametrize("soft", [False, True])
def test_entropy_falls_with_alpha(world: Gridworld, soft: bool) -> None:
    lasts = [policy_iteration(world, alpha, soft)[-1] for alpha in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]
    entropies = [entropy(last.log_policy)[world.away].mean() for last in lasts]
    assert (np.diff(entropies) < 0).all()
    assert np.log(4) > entropies[0] > 1.3
    assert entropies[-1] < 0.5, "what is left are ways of one length"


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_the_greedy_path_reaches_the_goal_from_every_cell(soft: bool, gamma: float) -> None:
    for text in (MAP, OTHER):
        world = read_map(text, gamma)
        for alpha in (0.1, 1.0, 10.0):
            found = policy_iteration(world, alpha, soft)
            assert reaches_goal(world, found[-1].log_policy).all()
            assert not reaches_goal(world, found[0].log_policy).all()
            if not soft:  # under any policy: V <= max Q = gamma max V(next), so some next cell is worth more
                assert all(reaches_goal(world, r.q).all() for r in found)


def test_the_goal_is_worth_most_only_because_it_does_not_end_the_episode() -> None:
    """With an end, more entropy bonus is had anywhere else."""
    world, bonus = read_map(MAP), 1.0
    value = policy_iteration(world, 1 / bonus, soft=True)[-1].soft_value
    assert value.argmax() == world.goal
    wandering = bonus * np.log(4) / (1 - world.gamma)
    assert value[world.away].min() > wandering > 1, "1 is all that there would be to a goal that ends it"


# The picture.


def test_arrows_are_where_they_belong() -> None:
    """Right of the goal the score points left, below it up, and no arrow starts at the goal."""
    world = read_map("...\n.G.\n...")
    policies = policy_iteration(world, 5.0)
    figure = draw_gridworld(world, {5.0: policies})
    length = 0.9 * np.tanh(np.linalg.norm(policies[-1].score[state(world, 1, 2)]))
    assert length > 0.8
    axes = figure.get_axes()
    assert len(axes) == 4, "three policies and a colour bar"
    assert axes[2].yaxis_inverted()
    for arrows in axes[2].collections:
        at = {tuple(place): k for k, place in enumerate(np.asarray(arrows.get_offsets()).tolist())}
        field = np.stack([arrows.U, arrows.V], -1)  # type: ignore[attr-defined]
        assert len(field) == 8
        assert (1.0, 1.0) not in at
        assert field[at[2.0, 1.0]] == pytest.approx([-length, 0], abs=1e-6)
        assert field[at[1.0, 2.0]] == pytest.approx([0, -length], abs=1e-6), "rows are counted downwards"
    assert "fixed point" in axes[2].get_title()
    assert axes[0].get_title().startswith("random policy")


# The command.


def computed(folder: Path, *args: str) -> dict[str, Any]:
    command.run([*args, "--out", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == ["gridworld.json", "gridworld.png"]
    assert (folder / "gridworld.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "gridworld.json").read_text())


def test_the_figure_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = computed(tmp_path / "deep" / "out")
    assert (found["map"], found["gamma"], found["soft"]) == (MAP.split(), 0.95, False)
    one, ten = found["alphas"]
    assert (one["alpha"], ten["alpha"]) == (1, 10)
    assert one["rounds"][-1]["entropy"] > 2 * ten["rounds"][-1]["entropy"]
    for record in found["alphas"]:
        first, last = record["rounds"][0], record["rounds"][-1]
        assert record["fixed_point"]
        assert [row["round"] for row in record["rounds"]] == list(range(len(record["rounds"])))
        assert first["least_value_gain"] is first["least_soft_value_gain"] is None
        assert first["reaching"] < last["reaching"] == 71
        assert abs(first["cosine"]) < 0.1
        assert last["cosine"] == pytest.approx(1)
    out = capsys.readouterr().out
    assert f"| 1 | 0 | {one['rounds'][0]['entropy']:.3f} |" in out
    assert f"| 10 | {len(ten['rounds']) - 1} | {ten['rounds'][-1]['entropy']:.3f} |" in out
    assert f"{tmp_path}/deep/out/gridworld.png" in out
    assert "raise --rounds" not in out


def test_its_settings_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "map.txt").write_text(OTHER)
    args = ["--map", str(tmp_path / "map.txt"), "--alpha", "2,0.5", "--gamma", "0.8", "--rounds", "2", "--soft"]
    found = computed(tmp_path / "out", *args)
    assert (found["map"], found["gamma"], found["soft"]) == (OTHER.split(), 0.8, True)
    assert [record["alpha"] for record in found["alphas"]] == [0.5, 2]
    expected = policy_iteration(read_map(OTHER, 0.8), 2.0, soft=True, rounds=2)
    rows = found["alphas"][1]["rounds"]
    assert len(rows) == len(expected) == 3
    assert rows[2]["cosine"] == expected[2].cosine
    gain = (expected[2].soft_value - expected[1].soft_value)[:-1].min()
    assert rows[2]["least_soft_value_gain"] == pytest.approx(gain), "the goal is the last cell, and left out"
    assert gain > 0
    assert "alpha 2 is at no fixed point yet; raise --rounds" in capsys.readouterr().out
    assert computed(tmp_path / "out", *args) == found
    assert computed(tmp_path / "out", *args, "--seed", "1") != found


def test_bad_input_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    maps = {
        "..x\n..G": "map: line 1 has 'x'; cells are",
        "..G\n....": "map: line 2 has 4 cells and line 1 has 3; give all lines the same length",
        "..G\n..G": "map: there are 2 goals; mark exactly one",
        "": "map: there are 0 goals",
        "##G": "map: 1 of its cells are no wall; give it 2 to 2500 of them",
        "...G\n" + 900 * "....\n": "map: 3604 of its cells",
        "..G\n###\n..#": "map: no way leads from line 3, column 1 to the goal",
    }
    cases = [
        (["--alpha", "0"], "--alpha has 0: it must be from 0.001 to 1000"),
        (["--alpha", "1,nan"], "--alpha has nan"),
        (["--alpha", "1,,2"], "'1,,2' is not a list of numbers such as 1,10"),
        (["--alpha", ",".join(map(str, range(1, 22)))], "--alpha has 21 numbers: give at most 20"),
        (["--gamma", "1"], "--gamma is 1: it must be above 0 and at most 0.999"),
        (["--gamma", "0"], "--gamma is 0"),
        (["--rounds", "0"], "--rounds is 0: it must be at least 1"),
        (["--seed", "-1"], "--seed is -1: it must be from 0"),
        (["--map", str(tmp_path / "none")], "--map is .*none.*No such file.*name a text file"),
        (["--map", str(tmp_path)], "--map is .*Is a directory"),
        (["--map", str(tmp_path / "bytes")], "--map is .*not UTF-8"),
        (["--out", str(tmp_path / "bytes")], "--out is .*choose another folder"),
    ]
    for number, (text, words) in enumerate(maps.items()):
        (tmp_path / str(number)).write_text(text)
        cases.append((["--map", str(tmp_path / str(number))], words))
    for args, words in cases:
        with pytest.raises(SettingError, match=words) as error:
            command.run(["--out", str(tmp_path / "out"), *args])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_main_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--gamma", "1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "qsm-gridworld: --gamma is 1: it must be above 0 and at most 0.999\n"
