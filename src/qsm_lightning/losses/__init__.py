"""One file per algorithm. Each loss is a TorchRL ``LossModule``: no optimizer, no logging, no Trainer."""

from qsm_lightning.losses.base import OffPolicyLoss
from qsm_lightning.losses.cqsm import CQSM, CQSMDiffusion, CQSMLoss
from qsm_lightning.losses.dacer import DACER
from qsm_lightning.losses.diffusion import DiffusionLoss
from qsm_lightning.losses.diffusion_ql import DiffusionQL
from qsm_lightning.losses.qsm import QSM, QSMLoss
from qsm_lightning.losses.sac import SAC
from qsm_lightning.losses.sdac import SDAC
from qsm_lightning.losses.td3 import TD3

# What ``--model.loss`` takes besides a class path.
ALGORITHMS: dict[str, type[OffPolicyLoss]] = {
    "qsm": QSM,
    "cqsm": CQSM,
    "cqsm_diffusion": CQSMDiffusion,
    "dacer": DACER,
    "diffusion_ql": DiffusionQL,
    "sac": SAC,
    "sdac": SDAC,
    "td3": TD3,
}

__all__ = [
    "ALGORITHMS",
    "CQSM",
    "DACER",
    "QSM",
    "SAC",
    "SDAC",
    "TD3",
    "CQSMDiffusion",
    "CQSMLoss",
    "DiffusionLoss",
    "DiffusionQL",
    "OffPolicyLoss",
    "QSMLoss",
]
