"""``qsm-report``: what runs came to, compared honestly."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsm_lightning import durable
from qsm_lightning.commands.base import Parser, run_command
from qsm_lightning.errors import require, require_package

EPILOG = """
RUNS are folders of runs, or folders in which runs lie at any depth. LABEL=FOLDER names an algorithm in the report;
by default its name is the loss's, with the settings by which runs of one task differ.

Examples:
  qsm-report sweeps/walker_walk --out report
  qsm-report "QSM=runs/Hopper-v5/version_0" "SAC=sweeps/sac" --out report
"""


def main(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-report``. See ``qsm-report --help``."""
    run_command("qsm-report", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "qsm-report",
        description="Learning curves, tables and statistics of runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders, or LABEL=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of page, tables and pictures (report)")
    parser.add_argument(
        "--selector", choices=("sample", "best_of_n"), default="sample", help="whose evaluations are compared (sample)"
    )
    parser.add_argument(
        "--archive", type=Path, metavar="DIR", help="also keep settings and evaluations of all runs here"
    )
    parser.add_argument("--force", action="store_true", help="compare what does not compare")
    return parser


def run(args: list[str] | None = None) -> None:
    """Parse, read, sum up and write."""
    options = _parser().parse_args(args)
    require_package("scipy", "report", "qsm-report")
    from qsm_lightning.report import page, results
    from qsm_lightning.report.results import Result
    from qsm_lightning.report.summary import summarize

    durable.check_writable(options.out / "index.html", "--out")
    if options.archive is not None:
        durable.check_writable(options.archive / results.VERSIONS, "--archive")
    named: list[tuple[str, Result]] = []
    unnamed: list[tuple[str, Result]] = []
    seen: set[Path] = set()
    for text in options.runs:
        label, equals, path = text.partition("=") if not Path(text).exists() else ("", "", text)
        require(
            not set(label) & set("|\n") and not label.startswith("_"),
            f"RUNS has {text!r}: a label begins with no _ and has no |; choose another",
        )
        require(path if equals else text, f"RUNS has {text!r}: name a folder, such as . for this one")
        require(
            not equals or label.strip(". ") != "",
            f"RUNS has {text!r}: give a LABEL before the =, of more than points",
        )
        for folder in results.find(Path(path if equals else text)):
            if not equals:
                if folder.resolve() in seen:
                    continue  # of overlapping RUNS
                seen.add(folder.resolve())
            result = results.read(folder, options.selector, options.force)
            if result is not None:
                (named if equals else unnamed).append((label, result))
    require(named or unnamed, "RUNS: none of the runs has been evaluated yet; wait for their first evaluation")
    found = [result for _, result in unnamed]
    labelled = [*named, *zip(results.label(found), found, strict=True)]
    comparison, notes = results.compare(labelled, options.selector, options.force)
    summary = summarize(comparison)
    with durable.writing(options.out, "--out"):
        written = page.write(options.out, comparison, summary, options.selector, notes)
    if options.archive is not None:
        with durable.writing(options.archive, "--archive"):
            results.archive(comparison, options.archive, {label for label, _ in named})
    print(page.markdown(summary))
    for note in notes:
        print(f"note: {note}")
    print(f"report: {written[0]}")
