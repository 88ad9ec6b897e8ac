"""Problems whose optimal Q and score are known in closed form, to measure what is learned against."""

from qsm_lightning.errors import require_package

require_package("scipy", "report", "qsm_lightning.theory")
