"""``qsm-gridworld``: figure 2 of arXiv 2312.11752, computed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qsm_lightning.commands.base import Parser, check_results, run_command, write_results
from qsm_lightning.errors import SettingError, require
from qsm_lightning.figures import png
from qsm_lightning.seeding import check_seed
from qsm_lightning.tables import markdown
from qsm_lightning.theory.gridworld import MAP, Gridworld, Round, entropy, policy_iteration, reaches_goal, read_map
from qsm_lightning.theory.gridworld_picture import draw_gridworld


def main(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-gridworld``. See ``qsm-gridworld --help``."""
    run_command("qsm-gridworld", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "qsm-gridworld",
        description="Iterate pi <- softmax(alpha Q) in a gridworld, exactly, and draw score and Q-gradient.",
    )
    parser.add_argument("--alpha", type=_alphas, default=[1.0, 10.0], metavar="1,10", help="scales of Q (1,10)")
    parser.add_argument("--gamma", type=float, default=0.95, help="discount (0.95)")
    parser.add_argument("--rounds", type=int, default=200, help="at most so many, less where pi stands still (200)")
    parser.add_argument("--soft", action="store_true", help="Q with the entropy bonus, so that each round improves")
    parser.add_argument("--map", metavar="FILE", help="a text file: '.' free, '#' wall, 'G' the goal (one is shipped)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first policy, which is random (0)")
    parser.add_argument("--out", default="gridworld", metavar="DIR", help="for gridworld.json and .png (gridworld)")
    return parser


def _alphas(text: str) -> list[float]:
    """Numbers with commas between."""
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,10") from None


def run(args: list[str] | None = None) -> None:
    """Parse, iterate, draw, write and print."""
    options = _parser().parse_args(args)
    require(len(options.alpha) <= 20, f"--alpha has {len(options.alpha)} numbers: give at most 20, a row each")
    for alpha in options.alpha:
        require(1e-3 <= alpha <= 1e3, f"--alpha has {alpha:g}: it must be from 0.001 to 1000")
    require(0 < options.gamma <= 0.999, f"--gamma is {options.gamma:g}: it must be above 0 and at most 0.999")
    require(options.rounds >= 1, f"--rounds is {options.rounds}: it must be at least 1")
    check_seed(options.seed, "--seed")
    folder = Path(options.out)
    check_results(folder, "gridworld.json", "gridworld.png")
    text = MAP if options.map is None else _read(options.map)
    world = read_map(text, options.gamma)
    found = {a: policy_iteration(world, a, options.soft, options.rounds, options.seed) for a in options.alpha}
    records = [_record(world, alpha, policies) for alpha, policies in found.items()]
    settings = {"map": text.split(), "gamma": options.gamma, "soft": options.soft, "seed": options.seed}
    files = {
        "gridworld.json": (json.dumps({**settings, "alphas": records}, indent=1) + "\n").encode(),
        "gridworld.png": png(draw_gridworld(world, found, options.soft)),
    }
    write_results(folder, _table(world, records), files)


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingError(f"--map is {name!r}: it cannot be read ({reason}); name a text file") from None


def _record(world: Gridworld, alpha: float, policies: list[Round]) -> dict[str, Any]:
    """An alpha's rounds as data; what is measured in every cell is over all but the goal."""
    rows: list[dict[str, Any]] = []
    for before, policy in zip([policies[0], *policies], policies, strict=False):
        gains = [(policy.value - before.value)[world.away], (policy.soft_value - before.soft_value)[world.away]]
        rows.append(
            {
                "round": len(rows),
                "entropy": float(entropy(policy.log_policy)[world.away].mean()),
                "value": float(policy.value[world.away].mean()),
                "least_value_gain": float(gains[0].min()) if rows else None,
                "soft_value": float(policy.soft_value[world.away].mean()),
                "least_soft_value_gain": float(gains[1].min()) if rows else None,
                "cosine": policy.cosine,
                "distance": policy.distance(alpha),
                "reaching": int(reaches_goal(world, policy.log_policy)[world.away].sum()),
            }
        )
    return {"alpha": alpha, "fixed_point": policies[-1].is_fixed(alpha), "rounds": rows}


def _table(world: Gridworld, records: list[dict[str, Any]]) -> str:
    """The first rounds of each alpha and the last."""
    about = (
        f"{world.away.sum()} cells: means of entropy (at most 1.386) and values, the least gain of any, and from how "
        "many the likeliest actions reach the goal"
    )
    gained = ["value", "least gain", "soft value", "least gain"]
    rows = [
        [
            f"{record['alpha']:g}",
            row["round"],
            f"{row['entropy']:.3f}",
            f"{row['value']:.3f}",
            _gain(row["least_value_gain"]),
            f"{row['soft_value']:.3f}",
            _gain(row["least_soft_value_gain"]),
            f"{row['cosine']:.4f}",
            f"{row['distance']:.4f}",
            row["reaching"],
        ]
        for record in records
        for row in record["rounds"][:5] + record["rounds"][5:][-1:]
    ]
    lines = [about, "", markdown(["alpha", "round", "entropy", *gained, "cosine", "distance", "reaching"], rows)]
    for record in records:
        if not record["fixed_point"]:
            lines += ["", f"alpha {record['alpha']:g} is at no fixed point yet; raise --rounds"]
    return "\n".join([*lines, ""])


def _gain(value: float | None) -> str:
    """Two digits; what is below a millionth is 0."""
    return "" if value is None else f"{0 if abs(value) < 1e-6 else value:.2g}"
