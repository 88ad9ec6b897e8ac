"""A policy whose actions tell which weights made them. Workers import it: it imports little."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from qsm_lightning.losses import QSM

SCALE = 4096


class Version(nn.Module):
    """How many updates have been made."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))


class VersionPolicy(TensorDictModuleBase):
    """Tells in its actions how many updates it has seen, with noise below that."""

    in_keys = ["observation"]
    out_keys = ["action"]

    def __init__(self, version: Version) -> None:
        super().__init__()
        self.version = version

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        noise = 0.9 * torch.rand(*tensordict.shape, 1)
        return tensordict.set("action", (self.version.count + noise) / SCALE)


class Versioned(QSM):
    """Counts its updates in what the exploration policy holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.version = Version()

    def update_targets(self) -> None:
        super().update_targets()
        self.version.count += 1

    def exploration_policy(self) -> Any:
        return VersionPolicy(self.version)
