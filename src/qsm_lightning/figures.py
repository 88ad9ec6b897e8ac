"""Figures as files."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as the content of a .png file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()
