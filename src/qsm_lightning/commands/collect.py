"""``qsm-collect``: transitions of a trained policy, for others to learn from."""

from __future__ import annotations

import argparse
import itertools
from contextlib import nullcontext
from pathlib import Path

import torch
from tensordict import TensorDictBase

from qsm_lightning import datasets, durable
from qsm_lightning.collect import make_collector
from qsm_lightning.commands.base import Parser, run_command
from qsm_lightning.commands.trained import Trained, add_checkpoint, load
from qsm_lightning.errors import require, require_positive
from qsm_lightning.progress import RecentExperience
from qsm_lightning.replay import frame_bytes, make_replay_buffer
from qsm_lightning.resources import available_memory, readable
from qsm_lightning.seeding import Purpose, check_seed, derive_seed


def main(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-collect``. See ``qsm-collect --help``."""
    run_command("qsm-collect", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "qsm-collect",
        description="Collect transitions with a trained policy into a file in D4RL's layout, for data.dataset.",
    )
    add_checkpoint(parser)
    parser.add_argument("--frames", type=int, required=True, help="number of transitions")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="file to write")
    parser.add_argument(
        "--actions",
        choices=("sample", "best_of_n", "exploration"),
        default="sample",
        help="as it is evaluated, one sample a step (of SAC its mean) or the best of 32 by Q, or with the noise of "
        "training (sample)",
    )
    parser.add_argument("--random", type=float, default=0.0, help="share of frames with uniform random actions (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of starts and noise (0)")
    return parser


def collect(
    trained: Trained, frames: int, actions: str = "sample", random: float = 0.0, seed: int = 0
) -> tuple[TensorDictBase, RecentExperience]:
    """Frames [frames] of a trained policy, in the order of time, and what episodes ended in them.

    Args:
        trained: whose policy and environment.
        frames: how many.
        actions: ``exploration``, or a selector of the evaluation.
        random: share of the frames, the first, that have uniform random actions.
        seed: of starts and noise.
    """
    loss = trained.module.loss
    exploring = actions == "exploration"
    policy = loss.exploration_policy() if exploring else loss.evaluation_policy(actions)
    env = trained.make_env()
    seen, buffer = RecentExperience(), make_replay_buffer(frames)
    weights = nullcontext() if exploring else trained.module.averaged_weights()  # training explores without
    with torch.random.fork_rng(), weights:
        torch.manual_seed(derive_seed(seed, 0, Purpose.DATASET_NOISE))
        env.set_seed(derive_seed(seed, 0, Purpose.DATASET_ENV))
        collector = make_collector(env, policy, 1, round(random * frames))
        for chunk in itertools.islice(collector, frames):
            seen.add(chunk)
            buffer.extend(chunk)
    env.close()
    return buffer[:], seen


def run(args: list[str] | None = None) -> None:
    """Parse, collect, write and say what it is."""
    options = _parser().parse_args(args)
    require_positive("--", frames=options.frames)
    require(0 <= options.random <= 1, f"--random is {options.random}: it must be between 0 and 1")
    check_seed(options.seed, "--seed")
    require(options.out.suffix == ".npz", f"--out is {str(options.out)!r}: give a file that ends in .npz")
    durable.check_writable(options.out, "--out")
    trained = load(options.checkpoint, options.trust)
    trained.module.loss.check_selector(options.actions, "--actions", also=("exploration",))
    hparams = trained.module.hparams
    arrays = 2  # the buffer, and what is written
    size = arrays * options.frames * frame_bytes(hparams["observation_dim"], hparams["action_dim"], timed=True)
    free = available_memory()
    require(
        size <= free,
        f"--frames is {options.frames}: that takes {readable(size)} of memory, and {readable(free)} is free; "
        "give fewer",
    )
    frames, seen = collect(trained, options.frames, options.actions, options.random, options.seed)
    with durable.writing(options.out, "--out"):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        datasets.save_npz(options.out, frames, trained.env)
    print(f"checkpoint: {trained.name}\nenv: {trained.env}\nframes: {len(frames)}\nepisodes: {len(seen.returns)}")
    if seen.returns:
        print(f"mean return: {sum(seen.returns) / len(seen.returns):.2f}")
    print(f"dataset: {options.out}")
