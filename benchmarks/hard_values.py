"""SAC whose values have no entropy term: is that what sets it apart from QSM and TD3 on HalfCheetah-v5?

As a loss for a sweep, beside ``sac`` and ``td3``::

    PYTHONPATH=. qsm-sweep --config halfcheetah --seeds 3-4 --model.loss.hidden "[256,256]" --trust \\
        --data.total_frames 200000 --data.eval_every_frames 10000 --data.eval_episodes 5 \\
        --model.actor_lr_decay_updates 0 --variant "sac=--model.loss sac" --variant "td3=--model.loss td3" \\
        --variant "hard=--model.loss benchmarks.hard_values.HardSAC"
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import SACLoss

from qsm_lightning.losses import SAC


class HardSACLoss(SACLoss):
    """y = r + gamma min_i Qbar_i(s', a'), without - alpha log pi(a'|s'); the policy's loss is as it was."""

    def _compute_target_v2(self, tensordict: TensorDictBase) -> Tensor:
        """Of a replay batch [B], [B]."""
        tensordict = tensordict.clone(False)
        following = tensordict.get("next").copy()
        with torch.no_grad():
            with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
                following["action"] = self.actor_network.get_dist(following).rsample()
            values = self._vmap_qnetworkN0(following, self.target_qvalue_network_params)["state_action_value"]
            tensordict["next", self.value_estimator.tensor_keys.value] = values.min(0).values
            return self.value_estimator.value_estimate(tensordict).squeeze(-1)


class HardSAC(SAC):
    """TorchRL's SAC but for that."""

    compilable = True
    inner_class = HardSACLoss
