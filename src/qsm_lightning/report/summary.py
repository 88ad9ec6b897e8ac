"""The figures of a comparison: what the pictures show and the tables hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qsm_lightning.report.results import Comparison, at, measured
from qsm_lightning.report.statistics import Array, improvement, interval, iqm, share

LEVELS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Band:
    """A quantity with the ends of its 95 % interval, arrays of the same shape."""

    value: Array
    low: Array
    high: Array

    def text(self, digits: int = 0) -> str:
        """``1234 [1200, 1260]``, or ``1234`` where there is no interval."""
        ends = "" if np.isnan(self.low) else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}{ends}"


def band(function: Callable[..., Array], *samples: Array) -> Band:
    """``function(*samples)`` with its stratified bootstrap interval."""
    return Band(np.asarray(function(*samples)), *interval(function, *samples))


@dataclass(frozen=True)
class Row:
    """One algorithm on one task, at the last frame at which all of the task's runs, or its own, were evaluated."""

    env: str
    label: str
    runs: int
    frames: int
    final: Band
    mean: float
    deviation: float
    best: Band


@dataclass(frozen=True)
class Summary:
    """All figures of a comparison.

    Args:
        frames: by environment and label, where curves have points.
        curves: by environment and label, interquartile mean over runs at ``frames``.
        rows: the table.
        scale: by environment, the returns that count as 0 and 1 where tasks are taken together.
        digits: by environment, the decimals with which returns tell its algorithms apart.
        labels: those that are compared in every environment, and can be taken together.
        aggregate: by label, interquartile mean of scaled final returns over all tasks.
        profiles: by label, share of runs above each of :data:`LEVELS`.
        improvements: by pair of labels, probability that a run of the first is above one of the second.
    """

    frames: dict[str, dict[str, list[int]]]
    curves: dict[str, dict[str, Band]]
    rows: list[Row]
    scale: dict[str, tuple[float, float]]
    digits: dict[str, int]
    labels: list[str]
    aggregate: dict[str, Band]
    profiles: dict[str, Band]
    improvements: dict[tuple[str, str], Band]


def scale_of(env: str, returns: Array) -> tuple[float, float]:
    """The returns that count as 0 and 1: dm_control's bounds, else the least and greatest of ``returns``."""
    if env.startswith("dmc:"):
        return 0.0, 1000.0
    low, high = float(returns.min()), float(returns.max())
    return low, high if high > low else low + 1


def digits_of(returns: Array) -> int:
    """Decimals that show a hundredth of the range of ``returns``, from 0 to 4."""
    width = float(np.ptp(returns))
    return 0 if width == 0 else min(4, max(0, math.ceil(2 - math.log10(width))))


def summarize(comparison: Comparison) -> Summary:
    """The figures of a comparison, every run with the same weight."""
    frames: dict[str, dict[str, list[int]]] = {}
    curves: dict[str, dict[str, Band]] = {}
    rows, scale, digits = [], {}, {}
    final: dict[str, dict[str, Array]] = {}
    for env, by_label in comparison.items():
        frames[env], short = measured(by_label)
        returns = {name: at(results, frames[env][name]) for name, results in by_label.items()}  # [runs, frames]
        curves[env] = {name: band(iqm, sample) for name, sample in returns.items()}
        compared = [sample.ravel() for name, sample in returns.items() if name not in short]
        together = np.concatenate(compared)
        low, high = scale[env] = scale_of(env, together)
        digits[env] = digits_of(together)
        for name, sample in returns.items():
            last = sample[:, -1]
            bands = band(iqm, last), band(iqm, sample.max(1))
            end = frames[env][name][-1]
            rows.append(Row(env, name, len(last), end, bands[0], last.mean(), _deviation(last), bands[1]))
            if name not in short:
                final.setdefault(name, {})[env] = (last - low) / (high - low)
    labels = [name for name, by_env in final.items() if len(by_env) == len(comparison)]
    samples = {name: [final[name][env] for env in comparison] for name in labels}
    pairs = list(itertools.combinations(labels, 2))
    return Summary(
        frames,
        curves,
        rows,
        scale,
        digits,
        labels,
        {name: band(iqm, *samples[name]) for name in labels},
        {name: band(share, *((x[:, None] > LEVELS).astype(float) for x in samples[name])) for name in labels},
        {pair: band(improvement, *samples[pair[0]], *samples[pair[1]]) for pair in pairs},
    )


def _deviation(sample: Array) -> float:
    """Standard deviation over runs; nan of one."""
    return float(sample.std(ddof=1)) if len(sample) > 1 else float("nan")
