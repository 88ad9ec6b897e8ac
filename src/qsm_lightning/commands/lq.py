"""``qsm-lq``: what the time step does to Q and score, by CQSM (arXiv 2510.17122) and by discrete Q-score matching."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_lightning.commands.base import Parser, check_results, run_command, write_results
from qsm_lightning.errors import require, require_not_negative, require_package
from qsm_lightning.figures import png
from qsm_lightning.seeding import check_seed
from qsm_lightning.tables import markdown

if TYPE_CHECKING:
    from qsm_lightning.theory.time_steps import Point

STEPS = "1/5,1/10,1/20,1/40,1/80,1/160,1/320"
SHORTEST, LONGEST = Fraction(1, 10_000), Fraction(1)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-lq``. See ``qsm-lq --help``."""
    run_command("qsm-lq", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "qsm-lq",
        description="Solve and learn a linear-quadratic problem in ever shorter time steps, by CQSM and by Q-score "
        "matching whose gamma was set for one time step, and draw how far Q and score are from continuous time's.",
    )
    parser.add_argument("--problem", choices=("scalar", "four"), default="scalar", help="of 1+1 or 4+2 dims (scalar)")
    parser.add_argument("--steps", type=_steps, default=_steps(STEPS), metavar="1/5,1/10", help=f"time steps ({STEPS})")
    parser.add_argument("--set-at", type=_step, default="1/20", metavar="1/20", help="where gamma was set (1/20)")
    parser.add_argument("--updates", type=int, default=3000, help="to learn with, at each point; 0 learns none (3000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is learned (0)")
    parser.add_argument("--out", default="lq", metavar="DIR", help="for lq.json and .png (lq)")
    return parser


def _step(text: str) -> Fraction:
    """A number of seconds, such as 1/20 or 0.05."""
    try:
        if "e" in text.lower():  # an exponent, which may be of any size
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time step such as 1/20 or 0.05") from None


def _steps(text: str) -> list[Fraction]:
    """Time steps with commas between, the longest first."""
    return sorted({_step(part) for part in text.split(",")}, reverse=True)


def run(args: list[str] | None = None) -> None:
    """Parse, solve, learn, draw, write and print."""
    options = _parser().parse_args(args)
    require(len(options.steps) <= 20, f"--steps has {len(options.steps)} time steps: give at most 20")
    for name, steps in {"--steps": options.steps, "--set-at": [options.set_at]}.items():
        for step in steps:
            require(SHORTEST <= step <= LONGEST, f"{name} has {step}: it must be from {SHORTEST} to {LONGEST}")
    require_not_negative("--", updates=options.updates)
    check_seed(options.seed, "--seed")
    folder = Path(options.out)
    check_results(folder, "lq.json", "lq.png")
    require_package("scipy", "theory", "qsm-lq")
    from qsm_lightning.theory import lq
    from qsm_lightning.theory.lq_picture import draw_time_steps
    from qsm_lightning.theory.time_steps import measure

    problem = lq.scalar() if options.problem == "scalar" else lq.four_dimensional()
    points = measure(problem, options.steps, options.set_at, options.updates, options.seed, tell=_tell)
    settings = {"problem": options.problem, "set_at": str(options.set_at)}
    settings |= {"updates": options.updates, "seed": options.seed, "points": [_record(point) for point in points]}
    files = {
        "lq.json": (json.dumps(settings, indent=1) + "\n").encode(),
        "lq.png": png(draw_time_steps(points, options.set_at)),
    }
    write_results(folder, _table(points, bool(options.updates)), files)


def _tell(point: Point) -> None:
    """A line for each point that took its time."""
    if point.learned:
        print(f"dt {point.dt}, {point.method}: error of Q {point.learned.q:.4f}", file=sys.stderr, flush=True)


def _record(point: Point) -> dict[str, object]:
    """A point as data."""
    found = {name: errors and asdict(errors) for name, errors in (("exact", point.exact), ("learned", point.learned))}
    return {"dt": str(point.dt), "seconds": float(point.dt), "method": point.method, "beta": point.beta, **found}


def _table(points: list[Point], learned: bool) -> str:
    """A row for each time step and method, and a sentence for each that has no numbers."""
    kinds = ("exact", "learned") if learned else ("exact",)
    names = {"q": "Q", "score": "score", "q_mean": "mean Q"}
    heads = [f"{name} {kind}" for name in names.values() for kind in kinds]
    about = "relative errors of Q and of the score, and mean Q over that of continuous time: of the exact fixed point"
    rows, missing = [], []
    for point in points:
        cells = [_cell(getattr(point, kind), quantity) for quantity in names for kind in kinds]
        rows.append([point.dt, point.method, *cells])
        if point.exact is None:
            missing += ["", f"{point.method} at dt {point.dt} is left out: no finite value was found"]
        elif learned and point.learned is None:
            missing += ["", f"{point.method} at dt {point.dt}: learning diverged"]
    table = markdown(["dt", "method", *heads], rows)
    return "\n".join([about + (", and learned" if learned else ""), "", table, *missing, ""])


def _cell(errors: object | None, quantity: str) -> str:
    return "" if errors is None else f"{getattr(errors, quantity):.4f}"
