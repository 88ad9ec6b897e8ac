"""Statistics of few runs: Agarwal et al., "Deep RL at the edge of the statistical precipice", arXiv 2108.13264.

A sample is one algorithm's scores on one task, runs along ``axis``. Bootstraps are stratified: runs are drawn within
each task, which keeps its number of runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, trim_mean

Array = NDArray[np.float64]
REPETITIONS = 2000


def iqm(*samples: Array, axis: int = 0) -> Array:
    """Interquartile mean of all runs of all tasks together: a quarter of them is left out at each end."""
    return np.asarray(trim_mean(np.concatenate(samples, axis), 0.25, axis=axis))


def share(*samples: Array, axis: int = 0) -> Array:
    """Mean of all runs of all tasks together: of scores above a level, a point of a performance profile."""
    return np.asarray(np.concatenate(samples, axis).mean(axis))


def improvement(*samples: Array, axis: int = 0) -> Array:
    """Probability that a run of one algorithm scores above a run of another: mean over tasks, ties count half.

    Args:
        samples: the first algorithm's of every task, and then the second's in the same order.
        axis: along which the runs are.
    """
    half = len(samples) // 2
    pairs = zip(samples[:half], samples[half:], strict=True)
    sides = [np.sign(np.moveaxis(x, axis, -1)[..., :, None] - np.moveaxis(y, axis, -1)[..., None, :]) for x, y in pairs]
    return np.asarray(np.mean([(side.mean((-2, -1)) + 1) / 2 for side in sides], axis=0))


def interval(function: Callable[..., Array], *samples: Array, seed: int = 0) -> tuple[Array, Array]:
    """Ends of the 95 % percentile interval of ``function(*samples)`` by stratified bootstrap over the first axis.

    They are nan where a task has one run only, which tells nothing of how runs differ.
    """
    if any(len(sample) < 2 for sample in samples):
        nothing = np.full(np.shape(function(*samples)), np.nan)
        return nothing, nothing
    found = bootstrap(samples, function, axis=0, n_resamples=REPETITIONS, method="percentile", rng=seed)
    return np.asarray(found.confidence_interval.low), np.asarray(found.confidence_interval.high)
