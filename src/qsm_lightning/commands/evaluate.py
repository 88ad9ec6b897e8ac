"""``qsm-eval``: evaluate what ``qsm-fit`` saved, with no setting repeated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qsm_lightning import durable
from qsm_lightning.commands.base import Parser, run_command
from qsm_lightning.commands.trained import add_checkpoint, add_selector, load
from qsm_lightning.envs import MOST_COPIES
from qsm_lightning.errors import require
from qsm_lightning.evaluation import run_episodes, summary
from qsm_lightning.recording import check_renderable, check_video_path, record_episode, write_video
from qsm_lightning.seeding import Purpose, check_seed, derive_seed


def main(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-eval``: evaluate a run or checkpoint. See ``qsm-eval --help``."""
    run_command("qsm-eval", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser("qsm-eval", description="Evaluate a trained policy.")
    add_checkpoint(parser)
    parser.add_argument("--episodes", type=int, default=10, help="number of whole episodes (10)")
    add_selector(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of starts and noise, which training never used (0)")
    parser.add_argument("--video", metavar="FILE", help="also record one episode to a .mp4 or .gif")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: list[str] | None = None) -> None:
    """Parse, evaluate and print."""
    options = _parser().parse_args(args)
    require(
        0 < options.episodes <= MOST_COPIES,
        f"--episodes is {options.episodes}: it must be from 1 to {MOST_COPIES}, each in an environment of its own",
    )
    check_seed(options.seed, "--seed")
    if options.video is not None:
        check_video_path(options.video)
    trained = load(options.checkpoint, options.trust)
    policy = trained.policy(options.selector, options.candidates)
    if options.video is not None:
        check_renderable(trained.env)
    env_seed = derive_seed(options.seed, 0, Purpose.REPORT_ENV)
    noise_seed = derive_seed(options.seed, 0, Purpose.REPORT_NOISE)
    env = trained.make_env(options.episodes)
    with trained.module.averaged_weights():
        result = {
            "checkpoint": trained.name,
            "env": trained.env,
            "frames": trained.frames,
            "selector": options.selector,
            **summary(run_episodes(env, policy, env_seed, noise_seed)),
        }
        env.close()
        if options.video is not None:
            frames, result["video_return"] = record_episode(trained.env, policy, env_seed, noise_seed)
            with durable.writing(Path(options.video), "--video"):
                write_video(options.video, frames)
            result["video"] = options.video
    if options.json:
        print(json.dumps(result))
    else:
        print(
            "\n".join(
                f"{key}: {f'{value:.2f}' if isinstance(value, float) else value}" for key, value in result.items()
            )
        )
