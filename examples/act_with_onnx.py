"""An episode with an exported policy: numpy, onnxruntime and gymnasium, and neither torch nor qsm_lightning.

qsm-export runs/Pendulum-v1/version_0 --out policy.onnx
python examples/act_with_onnx.py policy.onnx [SEED]
"""

import sys

import gymnasium as gym
import numpy as np
import onnxruntime

policy = onnxruntime.InferenceSession(sys.argv[1])
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
shapes = {value.name: [1 if size == "batch" else size for size in value.shape] for value in policy.get_inputs()}
env = gym.make(policy.get_modelmeta().custom_metadata_map["environment"])
low, high = env.action_space.low, env.action_space.high
generator = np.random.default_rng(seed)

observation, _ = env.reset(seed=seed)
total, done = 0.0, False
while not done:
    inputs = {"observation": gym.spaces.flatten(env.observation_space, observation).astype(np.float32)[None]}
    if "noise" in shapes:  # absent where the policy is deterministic
        inputs["noise"] = generator.standard_normal(shapes["noise"], np.float32)
    action = policy.run(None, inputs)[0][0]  # [A], in [-1, 1]
    observation, reward, terminated, truncated, _ = env.step(low + (action + 1) / 2 * (high - low))
    total += float(reward)
    done = terminated or truncated
print(f"return: {total:.2f}")
