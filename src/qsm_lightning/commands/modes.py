"""``qsm-modes``: how many modes policies have at fixed states, as figures 4 and 5 of arXiv 2312.11752 show it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from qsm_lightning.commands.base import Parser, check_results, run_command, write_results
from qsm_lightning.commands.trained import Trained, add_checkpoint, load
from qsm_lightning.errors import require, require_package
from qsm_lightning.evaluation import MAX_EPISODE_FRAMES
from qsm_lightning.figures import png
from qsm_lightning.modes import Modes, Sampled, find_modes, spread
from qsm_lightning.modes_picture import draw_modes
from qsm_lightning.seeding import Purpose, check_seed, derive_seed
from qsm_lightning.tables import markdown

MOST = 100_000  # samples
MOST_STATES = 50  # a row each


def main(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-modes``: sample and count. See ``qsm-modes --help``."""
    run_command("qsm-modes", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "qsm-modes",
        description="Sample actions of one or several policies at the same states, count their modes, and draw them.",
    )
    add_checkpoint(parser, several=True)
    parser.add_argument("--out", default="modes", metavar="DIR", help="where modes.json, .md and .png go (modes)")
    parser.add_argument(
        "--steps",
        type=_steps,
        default=[0],
        metavar="0,50,100",
        help="the states: those after so many steps of an episode of the first run's policy (0, its start)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1000,
        help="actions at each state (1000); of fewer than some hundred, more modes may be counted than there are",
    )
    parser.add_argument(
        "--projection", choices=("pca", "umap"), default="pca", help="to two dimensions, for actions of more (pca)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the episode and of the samples (0)")
    return parser


def _steps(text: str) -> list[int]:
    """Numbers of steps with commas between."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of step numbers such as 0,50,100")
    return sorted({int(part) for part in text.split(",")})


def run(args: list[str] | None = None) -> None:
    """Parse, sample, count, draw, write and print."""
    options = _parser().parse_args(args)
    require(50 <= options.samples <= MOST, f"--samples is {options.samples}: modes are counted of 50 to {MOST}")
    require(len(options.steps) <= MOST_STATES, f"--steps has {len(options.steps)} numbers: give at most {MOST_STATES}")
    require(
        options.steps[-1] < MAX_EPISODE_FRAMES,
        f"--steps has {options.steps[-1]}: it must be below {MAX_EPISODE_FRAMES}, where an episode is left",
    )
    check_seed(options.seed, "--seed")
    require_package("sklearn", "modes", "qsm-modes")
    if options.projection == "umap":
        require_package("umap", "umap", "--projection is umap")
    folder = Path(options.out)
    check_results(folder, "modes.json", "modes.md", "modes.png")
    runs = [load(name, options.trust) for name in options.checkpoint]
    for name, trained in zip(options.checkpoint, runs, strict=True):
        require(
            trained.env == runs[0].env,
            f"{name} is of {trained.env} and {options.checkpoint[0]} of {runs[0].env}: only runs of one environment "
            "can be compared at the same states",
        )
    states = reference_states(runs[0], options.steps, options.seed)
    found = [[_measure(trained, *state, options.samples, options.seed) for state in states] for trained in runs]
    names = _names(options.checkpoint, runs)
    files = {
        "modes.json": _json(options, runs, found),
        "modes.md": _table(options, names, runs, found),
        "modes.png": png(draw_modes(names, found, options.projection, options.seed)),
    }
    write_results(folder, files["modes.md"].decode(), files)


# The actions.


def reference_states(trained: Trained, steps: list[int], seed: int) -> list[tuple[int, Tensor]]:
    """The observations [O] before the actions numbered ``steps`` of an episode, each behind its number.

    The episode is that of the policy that is evaluated, from a start that training never used.

    Raises:
        SettingError: when the episode ends before.
    """
    env = trained.make_env()
    with torch.random.fork_rng(), trained.module.averaged_weights():
        torch.manual_seed(derive_seed(seed, 0, Purpose.REPORT_NOISE))
        env.set_seed(derive_seed(seed, 0, Purpose.REPORT_ENV))
        episode = env.rollout(steps[-1] + 1, trained.module.loss.evaluation_policy())
    env.close()
    observations = episode["observation"].flatten(0, -2)  # [frames, O]
    require(
        steps[-1] < len(observations),
        f"--steps has {steps[-1]}: the episode of {trained.name} ended after {len(observations)} frames; give smaller "
        "numbers, or another --seed",
    )
    return [(step, observations[step]) for step in steps]


def sample(trained: Trained, observation: Tensor, count: int, seed: int) -> np.ndarray:
    """``count`` actions [count, A] of the learned distribution in one state [O]."""
    policy = trained.module.loss.stochastic_policy()
    with torch.no_grad(), torch.random.fork_rng(), trained.module.averaged_weights():
        torch.manual_seed(seed)
        wide = TensorDict({"observation": observation.expand(count, -1)}, [count])
        return policy(wide)["action"].numpy()


def _measure(trained: Trained, step: int, observation: Tensor, count: int, seed: int) -> Sampled:
    actions = sample(trained, observation, count, derive_seed(seed, 0, Purpose.REPORT_NOISE, step))
    return Sampled(step, actions, find_modes(actions))


# What is written.


def _names(given: list[str], runs: list[Trained]) -> list[str]:
    """What each run is called: its algorithm, and by what its path differs where there are several of that."""
    algorithms = [type(trained.module.loss).__name__ for trained in runs]
    count = Counter(algorithms)
    return [a if count[a] == 1 else f"{a} ({path})" for a, path in zip(algorithms, _differing(given), strict=True)]


def _differing(paths: list[str]) -> list[str]:
    """Paths without the folders that all of them begin or end with."""
    parts = [Path(path).parts or (".",) for path in paths]
    for end, rest in ((0, slice(1, None)), (-1, slice(-1))):
        while len({path[end] for path in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [path[rest] for path in parts]
    return ["/".join(path) for path in parts]


def _json(options: argparse.Namespace, runs: list[Trained], found: list[list[Sampled]]) -> bytes:
    content = {
        "env": runs[0].env,
        "samples": options.samples,
        "seed": options.seed,
        "runs": [
            {
                "checkpoint": trained.name,
                "algorithm": type(trained.module.loss).__name__,
                "frames": trained.frames,
                "states": [state.record() for state in states],
            }
            for trained, states in zip(runs, found, strict=True)
        ],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _table(options: argparse.Namespace, names: list[str], runs: list[Trained], found: list[list[Sampled]]) -> bytes:
    about = f"{options.samples} actions at each state of {runs[0].env}, seed {options.seed}"
    rows = (
        (
            name,
            trained.frames,
            state.step,
            len(state.modes),
            state.modes.in_percent(6),
            _centres(state.modes),
            f"{spread(state.actions):.2f}",
        )
        for name, trained, states in zip(names, runs, found, strict=True)
        for state in states
    )
    head = ["policy", "frames", "step", "modes", "shares", "centres", "spread"]
    return f"{about}\n\n{markdown(head, rows)}\n".encode()


def _centres(modes: Modes) -> str:
    """The centres where they are short."""
    if modes.centres.shape[-1] > 2 or len(modes) > 6:
        return "in modes.json"
    return ", ".join(
        f"{centre[0]:.2f}" if len(centre) == 1 else f"({centre[0]:.2f}, {centre[1]:.2f})" for centre in modes.centres
    )
