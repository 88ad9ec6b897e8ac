"""QSM with ``action_noise`` in one place only: is a fixed 0.1 right, in acting and in the TD target?

As losses for a sweep, beside ``qsm`` with its noise in both and with ``--model.loss.action_noise 0``. What is in
docs/results was made with slopes at noisy actions, ``--model.loss.score_at noisy --model.loss.m_q_slope 0.15``::

    PYTHONPATH=. qsm-sweep --config dmc/cartpole_swingup --seeds 0-2 --model.loss.hidden "[256,256]" \\
        --data.total_frames 30000 --data.eval_every_frames 5000 --data.eval_episodes 5 --data.eval_selector sample \\
        --variant "both=--model.loss qsm" --variant "neither=--model.loss qsm --model.loss.action_noise 0" \\
        --variant "acting=--model.loss benchmarks.action_noise.NoiseInActing --model.loss.m_q auto" \\
        --variant "target=--model.loss benchmarks.action_noise.NoiseInTarget --model.loss.m_q auto" --trust
"""

from __future__ import annotations

from torch import Tensor

from qsm_lightning.losses import QSM
from qsm_lightning.policy import Policy
from qsm_lightning.precision import full_precision


class NoiseInActing(QSM):
    """No noise on the actions of the TD target."""

    compilable = True

    @full_precision
    def next_action(self, next_observation: Tensor) -> Tensor:
        """a' [B, A]: a sample for s' [B, O]."""
        return self.sampler(next_observation)


class NoiseInTarget(QSM):
    """No noise on the actions that are collected."""

    compilable = True

    def exploration_policy(self) -> Policy:
        """The policy that is evaluated."""
        return self.stochastic_policy()
