"""Evaluation: whole episodes of a policy in environments of its own, from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase

MAX_EPISODE_FRAMES = 100_000  # an episode without a time limit ends here


def run_episodes(
    env: EnvBase,
    policy: TensorDictModuleBase,
    env_seed: int,
    noise_seed: int,
    each_step: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """One whole episode in each of the environment's copies.

    The same seeds give the same starts and the same noise. Torch's global generators are left as they were, so that
    evaluating does not change training.

    Args:
        env: an environment from :func:`qsm_lightning.envs.make_env`, batch size [] or [E].
        policy: observation -> action.
        env_seed: seed of the environments' starts.
        noise_seed: seed of the policy's noise.
        each_step: called after every step of all copies; may raise to leave the evaluation.

    Returns:
        ``return`` and ``length``, float tensors [E] on the CPU.
    """
    with torch.random.fork_rng():
        torch.manual_seed(noise_seed)
        env.set_seed(env_seed)
        steps = env.rollout(
            MAX_EPISODE_FRAMES,
            policy,
            (lambda env, step: each_step()) if each_step else None,
            break_when_any_done=False,
            break_when_all_done=True,
        )
    steps = steps["next"].reshape(-1, steps.shape[-1])  # [E, longest]
    done = steps["done"].squeeze(-1).int()  # [E, longest]
    done[:, -1] = 1
    first_done = done.argmax(1)  # [E]
    rows = torch.arange(len(first_done))
    return {
        "return": steps["episode_reward"].squeeze(-1)[rows, first_done].float().cpu(),
        "length": steps["step_count"].squeeze(-1)[rows, first_done].float().cpu(),
    }


def summary(episodes: dict[str, Tensor]) -> dict[str, Any]:
    """Mean, deviation, least and greatest return and mean length of evaluated episodes, as plain numbers."""
    returns = episodes["return"]
    return {
        "episodes": len(returns),
        "mean": returns.mean().item(),
        "std": returns.std(correction=0).item(),
        "min": returns.min().item(),
        "max": returns.max().item(),
        "length": episodes["length"].mean().item(),
    }
