"""Evaluation curves of runs in continuous time, of any time step, against the seconds that were simulated.

Usage: python -m benchmarks.time_step OUT RUN [RUN ...]

OUT.png and OUT.csv are written; RUN is a run's folder.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib
import yaml
from matplotlib.figure import Figure

from benchmarks.curves import read_curve
from qsm_lightning.continuous import CONTINUOUS, ContinuousTime
from qsm_lightning.envs import make_env

matplotlib.use("Agg")


def read_run(folder: Path) -> tuple[str, float, float]:
    """A run's algorithm, its environment's time step in seconds, and that as a share of the usual one."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    time = ContinuousTime.parse(config["data"]["env"].removeprefix(f"{CONTINUOUS}:"))
    usual = round(make_env(f"{CONTINUOUS}:{time.env}").rollout(1)["next", "time_step"].item(), 6)
    algorithm = config["model"]["loss"]["class_path"].rpartition(".")[2]
    return algorithm, usual * time.time_scale, time.time_scale


def main() -> None:
    """Read the runs named on the command line and write the picture and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis, table = figure.subplots(), []
    for folder in options.runs:
        (algorithm, step, share), curve = read_run(folder), read_curve(folder)
        seconds = [row["frames"] * step for row in curve]
        returns = [row["return"] for row in curve]
        line, colour = "-" if share == 1 else "--", "C0" if algorithm == "QSM" else "C1"
        axis.plot(seconds, returns, ls=line, color=colour, marker=".", label=f"{algorithm}, dt = {step:g} s")
        table += [
            {"algorithm": algorithm, "dt": step, "frames": row["frames"], "seconds": s, "return": row["return"]}
            for row, s in zip(curve, seconds, strict=True)
        ]
    axis.set(xlabel="simulated seconds", ylabel="evaluation return (as at the usual time step)")
    axis.grid(alpha=0.3)
    axis.legend()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{options.out}.png", dpi=110)
    with Path(f"{options.out}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
