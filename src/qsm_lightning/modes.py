"""How many modes a sample of actions has, where they are, and how wide it is."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

RESOLUTION = 0.05  # in units of the action: what is closer is not told apart
MAX_COMPONENTS = 20
PATIENCE = 2  # numbers of components tried beyond the best one so far
DIP = 0.25  # between two modes the density falls below this share of the lower peak
MIN_SHARE = 0.05  # of the actions, in a mode


@dataclass(frozen=True)
class Modes:
    """The modes of N actions, those with most of them first.

    Args:
        centres: mean of each mode's actions, [K, A].
        shares: of the actions, [K]; with those in no mode they add up to 1.
        labels: which mode each action is in, -1 for none, [N].
    """

    centres: np.ndarray
    shares: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.shares)

    def in_percent(self, most: int) -> str:
        """The first ``most`` shares, as 52%, 48%."""
        return ", ".join([f"{share:.0%}" for share in self.shares[:most]] + ["..."] * (len(self) > most))


@dataclass(frozen=True)
class Sampled:
    """What one run does in one state.

    Args:
        step: of the episode that the state is from.
        actions: sampled, [N, A].
        modes: of those.
    """

    step: int
    actions: np.ndarray
    modes: Modes

    def record(self) -> dict[str, Any]:
        """What modes.json has."""
        return {
            "step": self.step,
            "modes": len(self.modes),
            "shares": self.modes.shares.tolist(),
            "spread": spread(self.actions),
            "centres": self.modes.centres.tolist(),
        }


def find_modes(actions: np.ndarray) -> Modes:
    """The modes of a sample of actions [N, A] in [-1, 1].

    The sample is cut into the components of the mixture of Gaussians with the least BIC. These are no modes yet: a
    flat, skewed or cut off peak takes several to fit. So the two parts with the least dip between them are joined,
    again and again, until there is a clear one between every two (:func:`dip`). Hennig (2010), "Methods for merging
    Gaussian mixture components", compares ways to do this. What then holds less than a twentieth of the actions is not
    counted.

    There is never more than ``MAX_COMPONENTS`` modes, and many small ones need many actions to be told apart: where A
    actuators are each at one bound or the other, there may be 2^A.
    """
    actions = np.asarray(actions, np.float64)
    found = _components(actions)
    parts = _joined(actions, [found == name for name in np.unique(found)])
    parts = [part for part in sorted(parts, key=np.sum, reverse=True) if part.mean() >= MIN_SHARE]
    return Modes(
        centres=np.stack([actions[part].mean(0) for part in parts]),
        shares=np.array([part.mean() for part in parts]),
        labels=np.select(parts, range(len(parts)), -1),
    )


def spread(actions: np.ndarray) -> float:
    """The deviation of actions [N, A], averaged over their components."""
    return float(np.asarray(actions, np.float64).std(0).mean())


def _components(actions: np.ndarray) -> np.ndarray:
    """The number of each action's Gaussian, [N]; more of them are tried until BIC has risen ``PATIENCE`` times."""
    from sklearn.mixture import GaussianMixture

    best, least, worse = None, np.inf, 0
    distinct = len(np.unique(actions, axis=0))
    for count in range(1, min(MAX_COMPONENTS, distinct) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fit may end before it has converged: its BIC tells what it is worth
            mixture = GaussianMixture(count, reg_covar=RESOLUTION**2, random_state=0).fit(actions)
        bic = mixture.bic(actions)
        worse = 0 if bic < least else worse + 1
        if bic < least:
            best, least = mixture, bic
        if worse == PATIENCE:
            break
    assert best is not None
    return best.predict(actions)


def _joined(actions: np.ndarray, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Parts of the actions, each a mask [N], joined until there is a clear dip between every two."""
    parts = list(parts)
    while len(parts) > 1:
        pairs = [(dip(actions[parts[i]], actions[parts[j]]), i, j) for j in range(len(parts)) for i in range(j)]
        shallowest, i, j = max(pairs)
        if shallowest < DIP:
            break
        parts[i] = parts[i] | parts.pop(j)
    return parts


def dip(one: np.ndarray, other: np.ndarray) -> float:
    """The least density between the peaks of two parts [N, A] and [M, A] of a sample, as a share of the lower peak.

    It is that of both together on the line through their means, estimated with a Gaussian kernel: 1 where there is no
    dip, and 0 where there is nothing between them.
    """
    line = other.mean(0) - one.mean(0)
    length = np.linalg.norm(line)
    if length < 1e-9:
        return 1.0
    places = [part @ line / length for part in (one, other)]
    width = max(RESOLUTION, min(0.9 * place.std() * len(place) ** -0.2 for place in places))  # Silverman's rule
    grid = np.linspace(min(map(np.min, places)), max(map(np.max, places)), 301)
    densities = [np.exp(-0.5 * ((grid[:, None] - place) / width) ** 2).sum(1) for place in places]
    first, last = sorted(int(density.argmax()) for density in densities)
    together = np.sum(densities, 0)[first : last + 1]
    return float(together.min() / min(together[0], together[-1]))
