"""How costs grow: an update with T, width, batch and observation; the buffer with its size; acting with environments.

Usage: python -m benchmarks.scaling [--axis T width batch observation buffer envs] [--out docs/results/scaling]

One axis is varied at a time, around width 256, batch 256, T 5 and an observation of 11. Updates are compiled, and next
to them stands the floor, their matrix products alone. OUT.png and OUT.json are written.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from benchmarks.machine import described, machine
from benchmarks.report import first_calls, in_turn, quartiles, save, told
from benchmarks.update import ACTION, Products, compiled_update, plain_update, replay_batch
from qsm_lightning.compiled import compile_acting
from qsm_lightning.losses import QSM
from qsm_lightning.replay import make_replay_buffer
from qsm_lightning.tables import markdown

matplotlib.use("Agg")
AXES: dict[str, list[int]] = {
    "T": [1, 5, 10, 20, 50],
    "width": [64, 128, 256, 512, 1024],
    "batch": [64, 256, 1024, 4096],
    "observation": [11, 50, 100, 400],
    "buffer": [10_000, 100_000, 1_000_000, 5_000_000],
    "envs": [1, 4, 16, 64, 256],
}
DEFAULTS = {"T": 5, "width": 256, "batch": 256, "observation": 11}


def update(axis: str, value: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of an update."""
    at = DEFAULTS | {axis: value}
    frames = replay_batch(at["batch"], at["observation"])
    widths = (at["width"], at["width"])
    loss = QSM(at["observation"], ACTION, hidden=widths, T=at["T"])
    with Products() as products:
        plain_update(QSM(at["observation"], ACTION, hidden=widths, T=at["T"]), frames)()
    return timed({"update": compiled_update(loss, frames), "floor": products.repeat()}, rounds)


def buffer(_: str, value: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of sampling 256 frames from a full buffer, and of adding one."""
    frames = make_replay_buffer(value)
    for first in range(0, value, 10_000):
        frames.extend(replay_batch(min(10_000, value - first), DEFAULTS["observation"]))
    new = replay_batch(1, DEFAULTS["observation"])
    return timed({"sample": partial(frames.sample, 256), "extend": partial(frames.extend, new)}, rounds)


def envs(_: str, value: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the actions for so many observations, compiled and not."""
    loss = QSM(DEFAULTS["observation"], ACTION, hidden=(DEFAULTS["width"],) * 2)
    plain, fast = loss.exploration_policy(), loss.exploration_policy()
    compile_acting(fast)
    seen = torch.randn(value, DEFAULTS["observation"])
    return timed({"compiled": partial(fast.checked_action, seen), "eager": partial(plain.checked_action, seen)}, rounds)


def timed(calls: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Quartiles in milliseconds."""
    first_calls(calls)
    return {name: quartiles([1e3 * s for s in seconds]) for name, seconds in in_turn(calls, rounds, 5).items()}


def draw(found: dict[str, dict[int, dict[str, list[float]]]]) -> Figure:
    """A panel for each axis, both scales logarithmic."""
    figure = Figure(figsize=(4 * min(3, len(found)), 3.2 * -(-len(found) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(found) // 3), min(3, len(found)), squeeze=False).flat
    for axis, panel in zip_longest(found, panels):
        panel.set_visible(axis is not None)
        if axis is None:
            continue
        values = list(found[axis])
        low_of_all: list[float] = []
        high_of_all: list[float] = []
        for name in next(iter(found[axis].values())):
            middle, low, high = zip(*(found[axis][value][name] for value in values), strict=True)
            low_of_all += low
            high_of_all += high
            panel.plot(values, middle, "o-", label=name, ms=4)
            panel.fill_between(values, low, high, alpha=0.25)
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="ms")
        panel.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        panel.minorticks_off()
        ticks = [tick for tick in TICKS if min(low_of_all) / 2 < tick < 2 * max(high_of_all)]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_ylim(min(low_of_all) / 1.3, max(high_of_all) * 1.3)
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


TICKS = [factor * 10.0**power for power in range(-3, 4) for factor in (1, 2, 5)]
LABELS = {
    "T": "denoising steps T",
    "width": "width of the hidden layers",
    "batch": "frames per update",
    "observation": "size of the observation",
    "buffer": "frames in the buffer",
    "envs": "observations at once",
}


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=list(AXES), default=list(AXES), help="what to vary (default: all)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of 5 calls (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write OUT.png and OUT.json")
    options = parser.parse_args()
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    results: dict[str, Any] = {"machine": machine(), "ms": {}}
    print(f"{described(results['machine'])}\n\nms: median (quartiles)")
    for axis in options.axis:
        measure = {"buffer": buffer, "envs": envs}.get(axis, update)
        of_axis = {value: measure(axis, value, options.rounds) for value in AXES[axis]}
        results["ms"][axis] = of_axis
        names = list(of_axis[AXES[axis][0]])
        rows = [[f"{value:,}", *(told(of[name], 3) for name in names)] for value, of in of_axis.items()]
        print(f"\n{markdown([LABELS[axis], *names], rows)}", flush=True)
    if options.out is not None:
        save(options.out.with_suffix(".json"), results)
        draw(results["ms"]).savefig(options.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
