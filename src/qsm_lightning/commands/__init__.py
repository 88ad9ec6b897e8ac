"""The commands, but for ``qsm-fit`` (``cli.py``): one file each."""
