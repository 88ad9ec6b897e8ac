"""QSM with fewer or better chosen actions in learning: does it get beyond where HalfCheetah-v5 stays?

As losses for a sweep, beside ``qsm``::

    PYTHONPATH=. qsm-sweep --config halfcheetah --seeds 1 --model.loss.hidden "[256,256]" --data.total_frames 200000 \\
        --data.eval_every_frames 10000 --data.eval_episodes 5 --trust \\
        --variant "target=--model.loss benchmarks.choosing.BestInTarget" \\
        --variant "both=--model.loss benchmarks.choosing.BestInBoth" \\
        --variant "one=--model.loss benchmarks.choosing.OneAction" \\
        --model.loss.m_q auto --model.loss.m_q_slope 0.05 --model.loss.score_at noisy
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsm_lightning.losses import QSM
from qsm_lightning.policy import BestOfNPolicy, ExplorationPolicy, Policy
from qsm_lightning.sampler import Sampler

N = 4


class BestInTarget(QSM):
    """y = r + gamma max_n min_i Qbar_i(s', a'_n) over N samples with their noise."""

    compilable = True

    def next_action(self, next_observation: Tensor) -> Tensor:
        """a' [N B, A] for s' [B, O]."""
        return super().next_action(next_observation.repeat_interleave(N, 0))

    def next_value(self, next_observation: Tensor, next_action: Tensor) -> Tensor:
        """max_n min_i Qbar_i(s', a'_n), [B]."""
        values = super().next_value(next_observation.repeat_interleave(N, 0), next_action)
        return values.view(-1, N).max(-1).values


class BestInBoth(BestInTarget):
    """The best of N samples is what is collected as well."""

    compilable = True

    def exploration_policy(self) -> Policy:
        """The best of N by the smaller critic, with noise."""
        return ExplorationPolicy(BestOfNPolicy(self.sampler, self.critics, N), self.action_noise)


class StillSampler(Sampler):
    """From x_T = 0, without noise inside: one action for each observation."""

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Observation [B, O] -> action [B, A]."""
        shape = self.noise_shape(len(observation))
        return super().forward(observation, torch.zeros(shape, dtype=observation.dtype, device=observation.device))


class OneAction(QSM):
    """The end of the climb that begins at 0, in collecting, in the TD target and in evaluation."""

    compilable = True

    @property
    def sampler(self) -> Sampler:
        """The reverse process without any noise."""
        return StillSampler(self.denoiser, self.schedule, self.temperature, self.clip_sampler)
