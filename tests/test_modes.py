"""Modes counted where their number is known, and ``qsm-modes`` on runs of several algorithms."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("sklearn", reason="the extra modes is not installed")

from qsm_lightning.cli import fit
from qsm_lightning.commands import modes as command
from qsm_lightning.commands.trained import Trained, load
from qsm_lightning.errors import SettingError
from qsm_lightning.losses import ALGORITHMS, QSM, SAC
from qsm_lightning.modes import Sampled, _components, dip, find_modes, spread
from qsm_lightning.modes_picture import draw_modes, project
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.seeding import Purpose, derive_seed
from tests.compare import last
from tests.helpers import SHRINK, has

N = 1000
WIDTHS = (1, 2, 6)
Draw = Callable[[np.random.Generator, int], np.ndarray]


def mixture(centres: list[float], deviation: float, shares: list[float] | None = None) -> Draw:
    """Gaussians around points of the diagonal, cut off at the bounds."""

    def draw(random: np.random.Generator, width: int) -> np.ndarray:
        chosen = np.asarray(centres)[random.choice(len(centres), N, p=shares)]
        return np.clip(chosen[:, None] + deviation * random.normal(size=(N, width)), -1, 1)

    return draw


# What is drawn, and the share of the actions in each mode.
KNOWN: dict[str, tuple[Draw, list[float]]] = {
    "one": (mixture([0.3], 0.1), [1]),
    "one, wide": (mixture([0], 0.4), [1]),
    "two": (mixture([-0.5, 0.5], 0.15), [0.5, 0.5]),
    "two, uneven": (mixture([-0.5, 0.5], 0.1, [0.9, 0.1]), [0.9, 0.1]),
    "three": (mixture([-0.7, 0, 0.7], 0.1, [0.5, 0.3, 0.2]), [0.5, 0.3, 0.2]),
    "uniform": (lambda random, width: random.uniform(-1, 1, (N, width)), [1]),
    "a point": (mixture([0.2], 0), [1]),
    "at a bound": (mixture([1], 0), [1]),
    "at both bounds": (mixture([-1, 1], 0, [0.4, 0.6]), [0.6, 0.4]),
    "around both bounds": (mixture([-1, 1], 0.15, [0.4, 0.6]), [0.6, 0.4]),
    "a tail from a bound": (lambda random, width: np.clip(1 - random.exponential(0.2, (N, width)), -1, 1), [1]),
    "tanh of a Gaussian": (lambda random, width: np.tanh(1.2 + 0.5 * random.normal(size=(N, width))), [1]),
    "tanh of a wide Gaussian": (lambda random, width: np.tanh(random.normal(size=(N, width))), [1]),
    "two, and anything": (
        lambda random, width: np.where(
            random.random((N, 1)) < 0.03, random.uniform(-1, 1, (N, width)), mixture([-1, 1], 0)(random, width)
        ),
        [0.485, 0.485],
    ),
    "next to nothing elsewhere": (mixture([-0.8, 0, 0.8], 0.05, [0.485, 0.03, 0.485]), [0.485, 0.485]),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", KNOWN)
def test_known_modes_are_counted(name: str, width: int) -> None:
    draw, shares = KNOWN[name]
    for seed in range(3):
        found = find_modes(draw(np.random.default_rng(seed), width))
        assert len(found) == len(shares), f"seed {seed}: {found.shares}"
        np.testing.assert_allclose(found.shares, shares, atol=0.06)


def test_centres_shares_and_labels_belong_together() -> None:
    draw, _ = KNOWN["three"]
    actions = draw(np.random.default_rng(0), 2)
    found = find_modes(actions)
    assert found.centres == pytest.approx(np.array([[-0.7, -0.7], [0, 0], [0.7, 0.7]]), abs=0.02)
    for k in range(3):
        np.testing.assert_allclose(found.centres[k], actions[found.labels == k].mean(0))
        assert found.shares[k] == (found.labels == k).mean()
    assert (np.diff(found.shares) < 0).all()


def test_what_is_in_no_mode_is_labelled_so() -> None:
    draw, _ = KNOWN["next to nothing elsewhere"]
    actions = draw(np.random.default_rng(0), 1)
    found = find_modes(actions)
    assert np.array_equal(found.labels == -1, np.abs(actions[:, 0]) < 0.4)
    assert found.shares.sum() == pytest.approx((found.labels >= 0).mean())


def test_simpler_counts_would_be_wrong() -> None:
    """What is here counts neither components, as BIC has several for a flat peak, nor what mean shift ends in."""
    from sklearn.cluster import MeanShift

    random = np.random.default_rng(0)
    flat, _ = KNOWN["uniform"]
    assert len(np.unique(_components(flat(random, 1)))) > 2
    two, _ = KNOWN["two, and anything"]
    actions = two(random, 2)
    assert len(MeanShift(bin_seeding=True).fit(actions).cluster_centers_) > 10
    assert len(find_modes(actions)) == 2


def test_corners_are_modes() -> None:
    """Three actuators at either bound, three that rest."""
    random = np.random.default_rng(0)
    actions = np.concatenate([np.sign(random.normal(size=(N, 3))), np.zeros((N, 3))], 1)
    found = find_modes(np.clip(actions + 0.1 * random.normal(size=actions.shape), -1, 1))
    assert len({tuple(np.sign(centre[:3])) for centre in found.centres}) == len(found) == 8


def test_a_tanh_gaussian_wide_enough_is_at_both_bounds() -> None:
    actions = np.tanh(3 * np.random.default_rng(0).normal(size=(N, 1)))
    assert sorted(find_modes(actions).centres[:, 0]) == pytest.approx([-0.9, 0.9], abs=0.1)


def test_the_dip_between_two_gaussians() -> None:
    """2 exp(-d^2 / 8 s^2) / (1 + exp(-d^2 / 2 s^2)) at the distance d, s^2 their variance and the kernel's."""
    random = np.random.default_rng(0)
    for distance in (0.0, 0.3, 0.6, 0.9):
        one, other = (random.normal([place, 0.0], 0.15, (20000, 2)) for place in (0.0, distance))
        width = max(0.05, 0.9 * 0.15 * 20000**-0.2)
        x = distance**2 / (0.15**2 + width**2)
        expected = min(1.0, 2 * np.exp(-x / 8) / (1 + np.exp(-x / 2)))
        assert dip(one, other) == pytest.approx(expected, abs=0.05)


def test_the_spread_by_hand() -> None:
    assert spread(np.array([[-1.0, 0.5], [1.0, 0.5]])) == 0.5
    assert spread(np.random.default_rng(0).uniform(-1, 1, (10**5, 3))) == pytest.approx(3**-0.5, abs=0.01)


# What is sampled.


def sampled(policy: Any, observation: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return policy(TensorDict({"observation": observation}, [len(observation)]))["action"]


def test_the_distribution_of_sac_is_sampled_though_its_mean_is_evaluated() -> None:
    loss, observation = SAC(3, 2, hidden=(16, 16)), torch.zeros(N, 3)
    drawn = sampled(loss.stochastic_policy(), observation)
    assert torch.equal(drawn, sampled(loss.exploration_policy(), observation))
    assert spread(drawn.numpy()) > 0.3
    assert spread(sampled(loss.evaluation_policy(), observation).numpy()) < 1e-6


def test_no_exploration_noise_is_measured() -> None:
    observation = torch.zeros(N, 3)
    for loss in (ALGORITHMS["td3"](3, 2, hidden=(16, 16)), QSM(3, 2, hidden=(16, 16), action_noise=0.5)):
        drawn = sampled(loss.stochastic_policy(), observation)
        assert torch.equal(drawn, sampled(loss.evaluation_policy(), observation))
        assert not torch.equal(drawn, sampled(loss.exploration_policy(), observation))


# The command.


def trained(folder: Path, env: str, *algorithms: str) -> list[str]:
    """Tiny runs in ``folder``, one of each algorithm; their folders."""
    for name in algorithms:
        settings = [f"--data.env={env}", f"--trainer.default_root_dir={folder}", f"--name={name}"]
        fit([*settings, "--model.loss", name, *SHRINK, "--data.eval_selector=sample", "--data.eval_episodes=1"])
    return [str(folder / name / "version_0") for name in algorithms]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return trained(tmp_path_factory.mktemp("toys"), "qsm_lightning/TwoGoals-v0", "qsm", "diffusion_ql", "sac", "td3")


@pytest.fixture(scope="module")
def hoppers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return trained(tmp_path_factory.mktemp("hoppers"), "Hopper-v5", "qsm", "td3")


def measure(tmp_path: Path, *args: str) -> dict[str, Any]:
    """What modes.json has after the command; it and the others are there, whole."""
    command.run([*args, "--out", str(tmp_path / "out" / "modes")])
    folder = tmp_path / "out" / "modes"
    assert sorted(path.name for path in folder.iterdir()) == ["modes.json", "modes.md", "modes.png"]
    assert (folder / "modes.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "modes.json").read_text())


def test_runs_of_four_algorithms_are_compared(
    toys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(tmp_path, *toys, "--steps", "2,0", "--samples", "200")
    assert [run["algorithm"] for run in found["runs"]] == ["QSM", "DiffusionQL", "SAC", "TD3"]
    for run in found["runs"]:
        assert [state["step"] for state in run["states"]] == [0, 2]
        for state in run["states"]:
            assert len(state["shares"]) == len(state["centres"]) == state["modes"] >= 1
            assert sum(state["shares"]) <= 1.0000001
        stochastic = run["algorithm"] != "TD3"
        assert all((state["spread"] > 0.1) == stochastic for state in run["states"])
    last_run = found["runs"][-1]
    assert (last_run["frames"], last_run["states"][0]["modes"]) == (60, 1)
    table = (tmp_path / "out" / "modes" / "modes.md").read_text()
    assert len(re.findall(r"^\| (?:QSM|DiffusionQL|SAC|TD3) \| 60 \| [02] \| \d", table, re.M)) == 8
    out = capsys.readouterr().out
    assert table in out
    assert f"{tmp_path}/out/modes/modes.png" in out


def test_the_seed_decides_what_is_measured(toys: list[str], tmp_path: Path) -> None:
    qsm = toys[0]
    one, two, other = (measure(tmp_path, qsm, "--seed", seed) for seed in ("1", "1", "2"))
    assert one == two
    assert one["runs"] != other["runs"]


def test_a_run_is_measured_alike_alone_and_beside_another(toys: list[str], tmp_path: Path) -> None:
    qsm, dql, *_ = toys
    both = measure(tmp_path, qsm, dql, "--samples", "100")["runs"]
    alone = measure(tmp_path, dql, "--samples", "100")["runs"]
    assert both[1] == alone[0], "the first state of an episode hangs on the seed alone"
    assert both[0] != both[1]


def test_states_are_those_of_an_episode_of_the_first_run(hoppers: list[str]) -> None:
    """However many of them are asked for."""
    qsm = load(hoppers[0])
    states = command.reference_states(qsm, [0, 1, 3], seed=0)
    assert [step for step, _ in states] == [0, 1, 3]
    longer = command.reference_states(qsm, [0, 1, 2, 3], seed=0)
    assert torch.equal(longer[3][1], states[2][1])
    other = command.reference_states(load(hoppers[1]), [0, 1], seed=0)
    assert torch.equal(other[0][1], states[0][1]), "the same start"
    assert not torch.equal(other[1][1], states[1][1]), "another action"


def untrained(loss: Any = QSM, **settings: Any) -> Trained:
    module = OffPolicyModule(3, 1, partial(loss, hidden=(16, 16)), **settings)
    return Trained(Path("state.ckpt"), module, {"env": "Pendulum-v1"}, 0)


def test_the_episode_has_random_streams_of_its_own() -> None:
    """Its states are those of an episode from their seeds, which neither training nor evaluation has."""
    run = untrained()
    env = run.make_env()
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(3, 0, Purpose.REPORT_NOISE))
        env.set_seed(derive_seed(3, 0, Purpose.REPORT_ENV))
        expected = env.rollout(3, run.module.loss.evaluation_policy())["observation"]
    states = command.reference_states(run, [0, 1, 2], seed=3)
    assert torch.equal(torch.stack([state for _, state in states]), expected)


def test_each_step_has_noise_of_its_own() -> None:
    run, state = untrained(), torch.zeros(3)
    first, again, second = (command._measure(run, step, state, 50, seed=0).actions for step in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_the_averaged_weights_act() -> None:
    """Whatever the trained ones are."""
    run, state = untrained(SAC, ema=0.9), torch.ones(3)

    def found() -> tuple[np.ndarray, torch.Tensor]:
        return command.sample(run, state, 50, seed=0), command.reference_states(run, [5], seed=0)[0][1]

    before = found()
    for weights, same in ((run.module.loss, True), (run.module.averages, False)):
        with torch.no_grad():
            for p in weights.parameters():
                p.zero_()
        assert np.array_equal(before[0], found()[0]) == same
        assert torch.equal(before[1], found()[1]) == same


UMAP = [pytest.mark.slow, pytest.mark.skipif(not has("umap"), reason="the extra umap is not installed")]  # compiles


@pytest.mark.parametrize("projection", ["pca", pytest.param("umap", marks=UMAP)])
def test_actions_of_more_dimensions_are_projected_together(projection: str, hoppers: list[str], tmp_path: Path) -> None:
    found = measure(tmp_path, *hoppers, "--samples", "60", "--projection", projection)
    assert [len(run["states"][0]["centres"][0]) for run in found["runs"]] == [3, 3]
    start = command.reference_states(load(hoppers[0]), [0], 0)[0][1]
    qsm, td3 = (command.sample(load(run), start, 60, 0) for run in hoppers)
    assert spread(td3) == 0
    (one, other), labels = project([qsm, td3], projection, 0)
    assert labels == (
        ("principal component 1", "principal component 2") if projection == "pca" else ("UMAP 1", "UMAP 2")
    )
    assert one.shape == other.shape == (60, 2)
    assert np.isfinite(one).all()
    assert spread(other) == pytest.approx(0, abs=1e-6), "one action is one point"
    if projection == "pca":  # distances are kept but for what the third dimension has of them
        gaps, kept = (np.linalg.norm(part - place, axis=-1) for part, place in ((qsm, td3), (one, other)))
        assert (kept <= gaps + 1e-6).all()
        assert kept.sum() > 0.7 * gaps.sum()


def test_few_actions_are_too_few_for_umap() -> None:
    corners = np.sign(np.random.default_rng(0).normal(size=(60, 3)))
    (place,), labels = project([corners], "umap", 0)
    assert place.shape == (60, 2)
    assert labels[0] == "principal component 1"


def test_histograms_show_shares() -> None:
    wide, point = np.random.default_rng(0).uniform(-1, 1, (400, 1)), np.full((400, 1), 0.5)
    figure = draw_modes(["one", "other"], [[Sampled(0, part, find_modes(part))] for part in (wide, point)], "pca", 0)
    axes = figure.get_axes()
    heights = [[bar.get_y() + bar.get_height() for bar in axis.patches] for axis in axes]  # type: ignore[attr-defined]
    assert sum(heights[0]) == pytest.approx(1)
    assert max(heights[1]) == pytest.approx(1)
    for axis, found in zip(axes, heights, strict=True):
        assert axis.get_ylim() == pytest.approx((0, 1.05 * max(found)))


def test_two_dimensions_are_drawn_as_they_are() -> None:
    actions = [np.random.default_rng(i).uniform(-1, 1, (60, 2)) for i in range(2)]
    found = [[Sampled(5, part, find_modes(part))] for part in actions]
    figure = draw_modes(["one", "other"], found, "pca", 0)
    axes = figure.get_axes()
    assert len(axes) == 2
    assert [axis.get_title().partition("\n")[0] for axis in axes] == ["one", "other"]
    for axis, part in zip(axes, actions, strict=True):
        drawn = np.concatenate([np.asarray(points.get_offsets()) for points in axis.collections])
        assert np.array_equal(np.sort(drawn, 0), np.sort(part, 0))


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["runs/a/version_0/checkpoints/000004000", "runs/b/version_0/checkpoints/000004000"], ["a", "b"]),
        (["runs/a/checkpoints/000003000", "runs/a/checkpoints/000004000/"], ["000003000", "000004000"]),
        (["/x/a/version_0", "/x/a/version_1/checkpoints/1"], ["version_0", "version_1/checkpoints/1"]),
        (["a", "b/a"], ["a", "b/a"]),
        (["runs/a", "runs/a"], ["a", "a"]),
        (["."], ["."]),
        ([".", "../version_1"], [".", "../version_1"]),
    ],
)
def test_runs_are_called_by_what_their_paths_differ_in(paths: list[str], told: list[str]) -> None:
    assert command._differing(paths) == told


def test_bad_input_ends_in_a_sentence(toys: list[str], hoppers: list[str], tmp_path: Path) -> None:
    qsm = toys[0]
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "taken/modes.png").mkdir(parents=True)
    for args, words in (
        ([], "RUN_OR_CHECKPOINT"),
        ([qsm, hoppers[0]], "is of Hopper-v5 and .* of qsm_lightning/TwoGoals-v0: only runs of one environment"),
        ([qsm, "--steps", "0,50"], "--steps has 50: .* ended after [0-9]+ frames; give smaller"),
        ([qsm, "--steps", "first"], "'first' is not a list of step numbers such as 0,50,100"),
        ([qsm, "--samples", "10"], "--samples is 10: modes are counted of 50 to 100000"),
        ([qsm, "--samples", str(10**12)], "--samples is 1000000000000: modes are counted of 50 to 100000"),
        ([hoppers[0], "--seed", "5000000000"], "--seed is 5000000000: it must be from 0 to 4294967295"),
        ([qsm, "--seed", "-1"], "--seed is -1: it must be from 0"),
        ([qsm, "--projection", "tsne"], "--projection"),
        ([qsm, "--steps", "99999999999"], "--steps has 99999999999: it must be below 100000"),
        ([qsm, "--steps", ",".join(map(str, range(51)))], "--steps has 51 numbers: give at most 50"),
        ([qsm, "--out", str(tmp_path / "taken")], "--out is .*taken/modes.png'.*that is a folder"),
        ([qsm, "--out", str(file)], "--out is .*file.*choose another folder"),
        ([str(tmp_path)], "is neither a checkpoint nor the folder of a run"),
    ):
        with pytest.raises(SettingError, match=words) as error:
            command.run(args)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("package", "extra"), [("sklearn", "modes"), ("umap", "umap")])
def test_a_missing_extra_is_named(package: str, extra: str, toys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == package else find(name, *args))
    with pytest.raises(SettingError, match=rf"qsm-lightning\[{extra}\]"):
        command.run([toys[0], "--projection", "umap"])


def test_the_command_ends_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["nowhere"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "qsm-modes: 'nowhere' is neither a checkpoint nor the folder of a run that has one\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_qsm_keeps_both_optimal_actions_and_sac_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figure 4: the shipped toy, at the end of training."""
    monkeypatch.chdir(tmp_path)
    for name in ("qsm", "sac"):
        fit(["--config", "toy_two_goals", "--model.loss", name, f"--name={name}", "--data.eval_selector=sample"])
    runs = [str(last(tmp_path / "runs" / name / "version_0").path) for name in ("qsm", "sac")]
    qsm, sac = (run["states"][0] for run in measure(tmp_path, *runs)["runs"])
    assert qsm["modes"] == 2
    assert min(qsm["shares"]) > 0.2
    np.testing.assert_allclose(sorted(centre[0] for centre in qsm["centres"]), [-0.5, 0.5], atol=0.15)
    assert sac["modes"] == 1
    assert sac["shares"][0] > 0.95
