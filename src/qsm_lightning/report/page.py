"""A comparison written down: one page that opens from disk, tables in Markdown and CSV, pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from qsm_lightning import durable, tables
from qsm_lightning.figures import png
from qsm_lightning.report import pictures
from qsm_lightning.report.results import Comparison, Result
from qsm_lightning.report.summary import Band, Row, Summary

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } img { max-width: 100% }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .25rem .8rem .25rem 0; text-align: left }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums } tr { border-bottom: 1px solid #ddd }
p.note { color: #555; font-size: 13px } .wide { overflow-x: auto }
"""
DPI, SHOWN_DPI = 140, 80  # of the pictures, and at which the page shows them
COLUMNS = ("task", "algorithm", "runs", "frames", "final, IQM [95 %]", "final, mean ± deviation", "best, IQM [95 %]")


def cells(row: Row, n: int) -> list[str]:
    """A row as text with ``n`` decimals, in the order of :data:`COLUMNS`. One run has no interval and no deviation."""
    mean = f"{row.mean:.{n}f} ± {row.deviation:.{n}f}" if row.runs > 1 else f"{row.mean:.{n}f}"
    return [row.env, row.label, str(row.runs), f"{row.frames:,}", row.final.text(n), mean, row.best.text(n)]


def table(summary: Summary) -> list[list[str]]:
    """The table as text."""
    return [cells(row, summary.digits[row.env]) for row in summary.rows]


def markdown(summary: Summary) -> str:
    """The table in Markdown."""
    return f"{tables.markdown(COLUMNS, table(summary))}\n"


def table_csv(summary: Summary) -> str:
    """The table as CSV, in numbers."""
    ends = [f"{kind}_{part}" for kind in ("final", "best") for part in ("iqm", "low", "high")]
    head = ["env", "algorithm", "runs", "frames", "final_mean", "final_deviation", *ends]

    def numbers(row: Row) -> list[Any]:
        bands = [float(x) for band in (row.final, row.best) for x in (band.value, band.low, band.high)]
        return [row.env, row.label, row.runs, row.frames, row.mean, row.deviation, *bands]

    return tables.csv_text(head, map(numbers, summary.rows))


def _bands_csv(head: list[str], bands: Iterable[tuple[tuple[str, ...], Band]]) -> str:
    """Quantities and the ends of their intervals as CSV, in numbers, one a line."""
    rows = ([*names, float(b.value), float(b.low), float(b.high)] for names, b in bands)
    return tables.csv_text([*head, "low", "high"], rows)


def aggregate_csv(summary: Summary) -> str:
    """The interquartile mean of each algorithm's scaled final returns over all tasks."""
    return _bands_csv(["algorithm", "iqm"], (((name,), band) for name, band in summary.aggregate.items()))


def improvement_csv(summary: Summary) -> str:
    """The probability that a run of one algorithm is above a run of another."""
    return _bands_csv(["algorithm", "other", "probability"], summary.improvements.items())


def evaluations_csv(comparison: Comparison) -> str:
    """Every evaluation of every run."""
    rows = (
        [env, name, result.seed, frame, value]
        for env, by_label in comparison.items()
        for name, results in by_label.items()
        for result in results
        for frame, value in zip(result.frames.astype(int), result.returns, strict=True)
    )
    return tables.csv_text(["env", "algorithm", "seed", "frames", "return"], rows)


def _html_table(head: list[str], rows: list[list[str]], numbers: int) -> str:
    """A table whose columns from number ``numbers`` on are set as numbers."""

    def line(tag: str, values: list[str]) -> str:
        kinds = [' class="number"' if i >= numbers else "" for i in range(len(values))]
        return "".join(f"<{tag}{kind}>{html.escape(v)}</{tag}>" for kind, v in zip(kinds, values, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{line("th", head)}</tr>\n{body}</table></div>\n'


def _image(png: bytes, text: str) -> str:
    width = int.from_bytes(png[16:20], "big") * SHOWN_DPI // DPI  # of a PNG's header
    content = base64.b64encode(png).decode()
    return f'<p><img alt="{html.escape(text)}" width="{width}" src="data:image/png;base64,{content}"></p>\n'


def _provenance(results: list[Result]) -> str:
    """Which versions the runs were made with, and where they are."""
    packages = sorted({package for result in results for package in result.versions})
    versions = {p: ", ".join(sorted({result.versions.get(p, "unknown") for result in results})) for p in packages}
    table = _html_table(["package", "versions"], [[*item] for item in versions.items()], 2)
    places = "".join(f"<li>{html.escape(str(result.run))}</li>\n" for result in results)
    unknown = "" if packages else "<p>The runs do not say with which versions they were made.</p>\n"
    return f"{table}{unknown}<details><summary>{len(results)} runs</summary><ul>{places}</ul></details>\n"


def page(comparison: Comparison, summary: Summary, images: dict[str, bytes], selector: str, notes: list[str]) -> str:
    """The page: everything in one file, with nothing loaded from elsewhere."""
    results = [result for by_label in comparison.values() for each in by_label.values() for result in each]
    ends = {env: [f"{end:.{summary.digits[env]}f}" for end in pair] for env, pair in summary.scale.items()}
    scales = "; ".join(f"{env}: {' and '.join(pair)}" for env, pair in ends.items())
    parts = [
        "<h1>Comparison of runs</h1>\n",
        f"<p>{len(results)} runs on {len(comparison)} tasks, evaluated with <b>{html.escape(selector)}</b>. "
        "Curves and tables end where all runs of a task were evaluated, or of an algorithm that was left off early. "
        "IQM is the interquartile mean over runs, and of three or fewer their mean; bands are 95 % intervals of a "
        "stratified bootstrap over runs: on one task, of three runs from the least to the greatest, and of one, drawn "
        "dashed, none.</p>\n",
        "<h2>Learning curves</h2>\n",
        _image(images["curves"], "evaluation return over frames"),
        "<h2>Final and best</h2>\n",
        _html_table(list(COLUMNS), table(summary), 2),
        '<p class="note">Final is the last evaluation, best the highest one of each run: chosen after the fact, it is '
        "above what a policy of that run is worth.</p>\n",
    ]
    if "aggregate" in images:
        parts += [
            "<h2>All tasks together</h2>\n",
            f'<p class="note">Returns are scaled so that these count as 0 and 1: {html.escape(scales)}.</p>\n',
            _image(images["aggregate"], "scaled final return"),
            _html_table(["algorithm", "IQM [95 %]"], [[n, b.text(2)] for n, b in summary.aggregate.items()], 1),
            _image(images["profiles"], "performance profiles"),
        ]
    if "improvement" in images:
        pairs = [[*pair, band.text(2)] for pair, band in summary.improvements.items()]
        parts += ["<h2>Probability of improvement</h2>\n", _image(images["improvement"], "probability of improvement")]
        parts += [_html_table(["a run of", "is above one of", "with probability [95 %]"], pairs, 2)]
    parts += ["<h2>Made with</h2>\n", _provenance(results)]
    parts += [f'<p class="note">{html.escape(note)}.</p>\n' for note in notes]
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Comparison of runs</title>'
        f"<style>{STYLE}</style>\n<body>\n{''.join(parts)}</body></html>\n"
    )


def write(out: Path, comparison: Comparison, summary: Summary, selector: str, notes: list[str]) -> list[Path]:
    """Write page, tables and pictures into the folder ``out``; returns their paths, the page first."""
    drawn = {"curves": pictures.learning_curves}
    if summary.labels:
        drawn |= {"aggregate": pictures.aggregate, "profiles": pictures.profiles}
    if len(summary.labels) > 1:
        drawn["improvement"] = pictures.improvements
    for name in {"aggregate", "profiles", "improvement"} - drawn.keys():  # an earlier report's
        (out / f"{name}.png").unlink(missing_ok=True)
    with rc_context({"text.parse_math": False}):  # a setting's value may have a $
        images = {name: png(draw(summary), DPI) for name, draw in drawn.items()}
    content = {
        "index.html": page(comparison, summary, images, selector, notes).encode(),
        "table.md": markdown(summary).encode(),
        "table.csv": table_csv(summary).encode(),
        "evaluations.csv": evaluations_csv(comparison).encode(),
        "aggregate.csv": aggregate_csv(summary).encode(),
        "improvement.csv": improvement_csv(summary).encode(),
        **{f"{name}.png": image for name, image in images.items()},
    }
    durable.write_files(out, content)
    return [out / name for name in content]
