"""An episode of a gymnasium task with a trained policy, in Python: its networks on one's own environment.

python examples/act_with_torch.py runs/Pendulum-v1/version_0 [SEED]
"""

import sys

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict

from qsm_lightning.commands.trained import load

trained = load(sys.argv[1])  # verified, and no code that is in it is run
policy = trained.policy("sample")  # or "best_of_n", with candidates=32
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
torch.manual_seed(seed)  # of the policy's noise
env = gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(gym.make(trained.env)), np.float32(-1), np.float32(1))

observation, _ = env.reset(seed=seed)
total, done = 0.0, False
with trained.module.averaged_weights():  # of model.ema, if the run had one
    while not done:
        now = TensorDict(observation=torch.as_tensor(observation, dtype=torch.float32))  # [O], or [N, O] of N
        action = policy(now)["action"]  # [A] or [N, A], in [-1, 1]
        observation, reward, terminated, truncated, _ = env.step(action.numpy())
        total += float(reward)
        done = terminated or truncated
print(f"return: {total:.2f}")
