"""The QSM loss in a plain TorchRL loop, without Lightning: collector, buffer, loss, an optimizer for each term.

Usage: python benchmarks/plain_torchrl.py [frames]
"""

from __future__ import annotations

import sys

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from qsm_lightning.envs import make_env
from qsm_lightning.evaluation import run_episodes, summary
from qsm_lightning.losses import QSMLoss
from qsm_lightning.networks import Critics, Denoiser
from qsm_lightning.schedule import NoiseSchedule


def train(frames: int = 8_000, warm_up: int = 1_000, hidden: tuple[int, ...] = (256, 256)) -> tuple[QSMLoss, float]:
    """Train on Pendulum-v1; returns the loss with its networks and the mean return of 10 evaluation episodes."""
    torch.manual_seed(0)
    env = make_env("Pendulum-v1")
    env.set_seed(0)
    loss = QSMLoss(Denoiser(3, 1, hidden), Critics(3, 1, hidden), NoiseSchedule("vp", 5), m_q=1.0)
    optimizers = {term: torch.optim.Adam(loss.term_parameters(term), 3e-4) for term in loss.terms}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=256)
    collector = Collector(
        env,
        loss.exploration_policy(),
        frames_per_batch=1,
        total_frames=frames,
        init_random_frames=warm_up,
        trust_policy=True,
        auto_register_policy_transforms=False,
    )
    for i, chunk in enumerate(collector):
        buffer.extend(chunk)
        if i < warm_up:
            continue
        batch = buffer.sample()
        for term, optimizer in optimizers.items():
            value, _ = loss.term_loss(term, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        loss.update_targets()
    episodes = run_episodes(make_env("Pendulum-v1", 10), loss.evaluation_policy(), env_seed=1, noise_seed=2)
    return loss, summary(episodes)["mean"]


if __name__ == "__main__":
    _, final_return = train(int(sys.argv[1]) if len(sys.argv) > 1 else 8_000)
    print(f"final return: {final_return:.2f}")
