"""Evaluation curves of runs as a picture and a CSV.

Usage: python benchmarks/curves.py OUT RUN [RUN ...] [--title T] [--reference 25000:364 40000:519]

OUT.png and OUT.csv are written; RUN is a run's folder. Reference points are drawn as given, for comparison.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib
import yaml
from matplotlib.figure import Figure

matplotlib.use("Agg")


def read_curve(run: Path) -> list[dict[str, float]]:
    """The evaluations of a run's metrics.csv: frames, return, its deviation over episodes, best_of_n's return."""
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/return")]
    return [
        {
            "frames": int(float(row["step"])),
            "return": float(row["eval/return"]),
            "return_std": float(row["eval/return_std"]),
            "return_best_of_n": float(row.get("eval_best_of_n/return") or "nan"),
        }
        for row in rows
    ]


def draw(curves: dict[str, list[dict[str, float]]], title: str, reference: list[tuple[int, float]]) -> Figure:
    """A line per run, the mean over runs where all were evaluated, and the reference points."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        x, y = [row["frames"] for row in curve], [row["return"] for row in curve]
        axis.plot(x, y, lw=1 if len(curves) > 1 else 2, alpha=0.6 if len(curves) > 1 else 1, label=name)
    if len(curves) > 1:
        common = sorted(set.intersection(*({row["frames"] for row in curve} for curve in curves.values())))
        by_frame = [{row["frames"]: row["return"] for row in curve} for curve in curves.values()]
        axis.plot(common, [sum(c[f] for c in by_frame) / len(by_frame) for f in common], "k", lw=2.5, label="mean")
    if reference:
        axis.plot(*zip(*reference, strict=True), "D", color="C3", label="authors' code (1 seed, 3 episodes)")
    axis.set(title=title, xlabel="environment frames", ylabel="evaluation return (10 episodes)")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def main() -> None:
    """Read the runs named on the command line and write the picture and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--title", default="")
    parser.add_argument("--reference", nargs="*", default=[], metavar="FRAMES:RETURN")
    options = parser.parse_args()
    curves = {}
    for run in options.runs:
        seed = yaml.safe_load((run / "config.yaml").read_text())["seed_everything"]
        curves[f"seed {seed}"] = read_curve(run)
    curves = dict(sorted(curves.items()))
    reference = [(int(f), float(r)) for f, r in (point.split(":") for point in options.reference)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, options.title, reference).savefig(f"{options.out}.png", dpi=110)
    with Path(f"{options.out}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "frames", "return", "return_std", "return_best_of_n"])
        writer.writeheader()
        writer.writerows({"run": name, **row} for name, curve in curves.items() for row in curve)


if __name__ == "__main__":
    main()
