"""Lightning callbacks. They read the trainer and the module, and never change the algorithm."""

from qsm_lightning.callbacks.checkpoint import RunCheckpoint
from qsm_lightning.callbacks.guard import StopOnNonFinite
from qsm_lightning.callbacks.interrupt import StopOnSignal
from qsm_lightning.callbacks.metrics import TrainingMetrics
from qsm_lightning.callbacks.policy_picture import PolicyPicture
from qsm_lightning.callbacks.progress import FrameProgress
from qsm_lightning.callbacks.video import EvaluationVideo

__all__ = [
    "EvaluationVideo",
    "FrameProgress",
    "PolicyPicture",
    "RunCheckpoint",
    "StopOnNonFinite",
    "StopOnSignal",
    "TrainingMetrics",
]
