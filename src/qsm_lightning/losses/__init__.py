"""One file per algorithm. Each loss is a TorchRL ``LossModule``: no optimizer, no logging, no Trainer."""

from qsm_lightning.losses.base import OffPolicyLoss
from qsm_lightning.losses.qsm import QSM, QSMLoss

__all__ = ["QSM", "OffPolicyLoss", "QSMLoss"]
