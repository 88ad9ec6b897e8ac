"""``python -m qsm_lightning``: ``qsm-fit``."""

from qsm_lightning.cli import fit

if __name__ == "__main__":
    fit()
