"""Linear-quadratic control in ever shorter time steps: by CQSM, and by Q-score matching whose gamma is one number.

The discount of CQSM is exp(-beta dt) per step. That of the discrete method is exp(-beta dt0) whatever the time step,
as gamma was set for steps of dt0. Both are measured against the closed form of continuous time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from fractions import Fraction
from typing import NamedTuple

from qsm_lightning.errors import SettingError
from qsm_lightning.theory.learning import Errors, errors_of, learn
from qsm_lightning.theory.lq import LinearQuadratic
from qsm_lightning.theory.lq_steps import discrete_policy_iteration

CONTINUOUS, DISCRETE = METHODS = ("CQSM", "discrete QSM")


class Point(NamedTuple):
    """A method in steps of ``dt``: what it ends in, exactly and learned. None where that is infinite or not asked for.

    ``beta`` is the discount rate it has there, per unit of time.
    """

    method: str
    dt: Fraction
    beta: float
    exact: Errors | None
    learned: Errors | None = None


def measure(
    problem: LinearQuadratic,
    steps: Sequence[Fraction],
    set_at: Fraction,
    updates: int = 0,
    seed: int = 0,
    tell: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Both methods in each of the time steps.

    Args:
        problem: of continuous time.
        steps: the dt.
        set_at: dt0, the time step that the discrete method's gamma was set for.
        updates: of the learned ones; 0 for the exact fixed points alone.
        seed: of what is learned.
        tell: called with each point when it is there.
    """
    points = []
    for dt in steps:
        for method in METHODS:
            beta = problem.beta * float(1 if method == CONTINUOUS else set_at / dt)
            point = Point(method, dt, beta, _exact(problem, float(dt), beta))
            if updates and point.exact:
                point = point._replace(learned=_learned(problem, float(dt), beta, updates, seed))
            points.append(point)
            tell(point)
    return points


def _exact(problem: LinearQuadratic, dt: float, beta: float) -> Errors | None:
    """The errors of the exact fixed point; None where the value is infinite, as it may be in long steps."""
    try:
        return errors_of(problem, discrete_policy_iteration(problem, dt, math.exp(-beta * dt)), problem.optimal())
    except SettingError:
        return None


def _learned(problem: LinearQuadratic, dt: float, beta: float, updates: int, seed: int) -> Errors | None:
    """The errors of what is learned; None where learning diverges."""
    errors = learn(problem, dt, beta=beta, updates=updates, seed=seed).errors(problem, problem.optimal())
    return errors if all(map(math.isfinite, astuple(errors))) else None
