r"""Q-score matching in a table: the single-goal gridworld of figure 2 of arXiv 2312.11752, computed exactly.

The iteration is $\pi_{k+1}(a|s) = \mathrm{softmax}_a\, \alpha Q^{\pi_k}(s, a)$. What a round improves depends on Q:

- of the plain reward, as in the paper. No round has to improve anything: the value may fall in some states and does so
  here, for each round answers the last policy's Q by a soft policy, also where the last policy was sharper.
- of the reward and an entropy bonus $H(\pi(\cdot|s)) / \alpha$ in every state passed (``soft``; Haarnoja et al., arXiv
  1801.01290, lemma 2). Then the soft value rises in every state until it stands still, by exactly
  $(I - \gamma P^{\pi_{k+1}})^{-1} \mathrm{KL}(\pi_k \| \pi_{k+1}) / \alpha$: where the score is not aligned with the
  gradient of Q, aligning it improves (the tabular form of theorem 4.3).

At a fixed point of either, $\log \pi = \alpha Q$ up to a constant in every state, so its differences over actions are
equal: score $= \alpha \nabla_a Q$ (the tabular form of theorem 4.1).

The goal is never left, and every step that ends there is rewarded by 1. If it ended the episode instead, the bonus
would be had only away from it, and soft policies of small alpha would avoid it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_lightning.errors import require

Array = NDArray[Any]

MOVES = ((0, 1), (0, -1), (-1, 0), (1, 0))  # (rows, columns) of the actions right, left, up, down
MOST_CELLS = 2500  # evaluation solves a dense system of as many equations

MAP = """\
.........
.........
..#####..
......#..
......#..
...G..#..
......#..
.........
.........
"""


@dataclass(frozen=True)
class Gridworld:
    """A map as a Markov decision process with S states, its free cells, and 4 deterministic actions.

    Attributes:
        cells: (row, column) of each state [S, 2].
        goal: the state that is the goal.
        next: state after each action [S, 4]; moves into a wall or over the border stay.
        reward: 1 for each step that ends at the goal [S, 4].
        gamma: the discount.
    """

    cells: Array
    goal: int
    next: Array
    reward: Array
    gamma: float

    @property
    def away(self) -> Array:
        """Which states are not the goal [S]."""
        return np.arange(len(self.cells)) != self.goal


def read_map(text: str, gamma: float = 0.95) -> Gridworld:
    """The gridworld of a map: a line for each row, "." for a free cell, "#" for a wall, one "G" for the goal.

    Raises:
        SettingError: for another sign, lines of different length, a number of goals other than one, and for a cell
            from which the goal cannot be reached.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        unknown = "".join(sorted(set(line) - set(".#G")))
        require(not unknown, f"map: line {number} has {unknown!r}; cells are '.' (free), '#' (wall) and 'G' (the goal)")
        require(
            len(line) == len(lines[0]),
            f"map: line {number} has {len(line)} cells and line 1 has {len(lines[0])}; give all lines the same length",
        )
    require(text.count("G") == 1, f"map: there are {text.count('G')} goals; mark exactly one cell with 'G'")
    cells = [(r, c) for r, line in enumerate(lines) for c, sign in enumerate(line) if sign != "#"]
    require(
        2 <= len(cells) <= MOST_CELLS, f"map: {len(cells)} of its cells are no wall; give it 2 to {MOST_CELLS} of them"
    )
    state = {cell: s for s, cell in enumerate(cells)}
    after = np.array([[state.get((r + i, c + j), state[r, c]) for i, j in MOVES] for r, c in cells])
    goal = next(s for s, (r, c) in enumerate(cells) if lines[r][c] == "G")
    _check_reachable(cells, after, goal)
    after[goal] = goal
    return Gridworld(np.array(cells), goal, after, (after == goal).astype(float), gamma)


def _check_reachable(cells: list[tuple[int, int]], after: Array, goal: int) -> None:
    reached = np.arange(len(cells)) == goal
    while (wider := reached | reached[after].any(1)).sum() > reached.sum():
        reached = wider
    row, column = cells[int(reached.argmin())]
    require(
        reached.all(),
        f"map: no way leads from line {row + 1}, column {column + 1} to the goal; open a wall or make that cell one",
    )


# Policies are log pi(a|s) [S, 4]: finite also where an action's probability is zero in float64.


def random_policy(world: Gridworld, seed: int = 0) -> Array:
    """A policy with Gaussian logits [S, 4]: its score knows nothing of the goal."""
    return improve(np.random.default_rng(seed).normal(size=world.next.shape), 1.0)


def improve(q: Array, alpha: float) -> Array:
    """The log of softmax(alpha Q) over the actions [S, 4]."""
    logits = alpha * (q - q.max(-1, keepdims=True))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def entropy(log_policy: Array) -> Array:
    """Entropy of the policy in each state [S], in nats: at most log 4."""
    return -(np.exp(log_policy) * log_policy).sum(-1)


def transitions(world: Gridworld, log_policy: Array) -> Array:
    """Probability of each next state [S, S] under the policy."""
    probability = np.zeros((len(world.cells), len(world.cells)))
    np.add.at(probability, (np.arange(len(world.cells))[:, None], world.next), np.exp(log_policy))
    return probability


def evaluate(world: Gridworld, log_policy: Array, bonus: float = 0.0) -> Array:
    r"""Exact value of each state [S]: V = E_\pi[Q] + ``bonus`` H(\pi), Q = r + gamma V(next), as a linear system.

    ``bonus`` is 0 for the plain value and 1 / alpha for the soft value.
    """
    gained = (np.exp(log_policy) * world.reward).sum(-1) + bonus * entropy(log_policy)
    return np.linalg.solve(np.eye(len(gained)) - world.gamma * transitions(world, log_policy), gained)


def action_values(world: Gridworld, value: Array) -> Array:
    """Q [S, 4] of the policy that has this value [S], plain or soft."""
    return world.reward + world.gamma * value[world.next]


def action_gradient(table: Array) -> Array:
    """Central differences over opposite actions [S, 2]: (right - left, up - down) / 2.

    The four actions are read as the points (1, 0), (-1, 0), (0, 1), (0, -1) of a plane: of log pi this is the score, of
    Q its gradient in the action. It compares opposite actions only: beside a wall it may lean to the wall, as staying
    is better than going away from the goal.
    """
    return np.stack([table[:, 0] - table[:, 1], table[:, 2] - table[:, 3]], -1) / 2


def reaches_goal(world: Gridworld, table: Array) -> Array:
    """From which states [S] the actions of the greatest entry, of log pi or of Q, lead to the goal."""
    follow = world.next[np.arange(len(table)), table.argmax(-1)]
    place = np.arange(len(table))
    for _ in place:
        place = follow[place]
    return place == world.goal


# The iteration.


@dataclass(frozen=True)
class Round:
    """A policy of the iteration, evaluated: log pi [S, 4], plain and soft value [S], the Q [S, 4] that comes next."""

    log_policy: Array
    value: Array
    soft_value: Array
    q: Array

    @property
    def score(self) -> Array:
        """Discrete score of the policy [S, 2]."""
        return action_gradient(self.log_policy)

    @property
    def q_gradient(self) -> Array:
        """Discrete action gradient of its Q [S, 2]."""
        return action_gradient(self.q)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both fields over all states: 1 where they are parallel."""
        both = np.linalg.norm(self.score) * np.linalg.norm(self.q_gradient)
        return float((self.score * self.q_gradient).sum() / both)

    def distance(self, alpha: float) -> float:
        """Norm of score - alpha grad Q, in units of that of alpha grad Q: 0 at a fixed point."""
        wanted = alpha * self.q_gradient
        return float(np.linalg.norm(self.score - wanted) / np.linalg.norm(wanted))

    def is_fixed(self, alpha: float) -> bool:
        """Whether the next policy is this one."""
        return bool(np.allclose(improve(self.q, alpha), self.log_policy, rtol=1e-9, atol=1e-9))


def policy_iteration(
    world: Gridworld, alpha: float, soft: bool = False, rounds: int = 200, seed: int = 0
) -> list[Round]:
    """The random policy and what ``rounds`` rounds make of it, or fewer that end in a fixed point.

    Args:
        world: where.
        alpha: scale of Q in the softmax.
        soft: iterate the Q with the entropy bonus, whose value improves every round, and not the paper's.
        rounds: at most so many.
        seed: of the first policy.
    """
    log_policy, found = random_policy(world, seed), []
    for _ in range(rounds + 1):
        value, soft_value = evaluate(world, log_policy), evaluate(world, log_policy, 1 / alpha)
        q = action_values(world, soft_value if soft else value)
        found.append(Round(log_policy, value, soft_value, q))
        if found[-1].is_fixed(alpha):
            break
        log_policy = improve(q, alpha)
    return found
