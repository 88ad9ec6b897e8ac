"""Tables as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def markdown(head: Sequence[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown, without a line break at its end."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


def csv_text(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table as CSV."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
