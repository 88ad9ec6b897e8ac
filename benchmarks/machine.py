"""What a benchmark ran on: hardware, versions and date."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
import torchrl


def machine() -> dict[str, Any]:
    """Hardware, versions, load beforehand and date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    found = {
        "date": date.today().isoformat(),
        "cpu": models[0].split(":")[1].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchrl": torchrl.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def described(found: dict[str, Any]) -> str:
    """:func:`machine` in one line."""
    gpu = f"{found['gpu']}, " if "gpu" in found else ""
    return (
        f"{found['date']}: {gpu}{found['cpu']}, {found['cores']} cores ({found['threads']} threads), "
        f"{found['memory_gib']} GiB, load average {found['load_average']} beforehand; Python {found['python']}, "
        f"torch {found['torch']}, torchrl {found['torchrl']}, pytorch-lightning {found['pytorch_lightning']}"
    )
