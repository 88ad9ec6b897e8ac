"""Training in Python: a LightningModule, a LightningDataModule and a Trainer, as ``qsm-fit`` puts them together.

python examples/train.py [FRAMES]
"""

import sys
from functools import partial

from pytorch_lightning import Trainer, seed_everything

from qsm_lightning.callbacks import FrameProgress, PolicyPicture, RunCheckpoint, StopOnNonFinite, TrainingMetrics
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.loggers import run_loggers
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule

frames = int(sys.argv[1]) if len(sys.argv) > 1 else 9_000
seed_everything(0)
data = OffPolicyDataModule("Pendulum-v1", total_frames=frames, init_random_frames=1_000, eval_every_frames=1_500)
loss = partial(QSM, hidden=(128, 128), m_q="auto", score_at="denoised")  # or SAC, DiffusionQL ..., or one's own
module = OffPolicyModule(data.observation_dim, data.action_dim, loss)
trainer = Trainer(
    max_epochs=-1,  # frames are the clock
    num_sanity_val_steps=0,
    inference_mode=False,  # the policy's picture takes gradients
    logger=run_loggers(None, "runs", "Pendulum-v1"),  # any of Lightning's
    callbacks=[StopOnNonFinite(), FrameProgress(), TrainingMetrics(), RunCheckpoint(), PolicyPicture()],
)
trainer.fit(module, data)
print(f"final return: {trainer.callback_metrics['eval/return']:.2f}")  # qsm-eval and other commands read its folder
