"""`python -m megatron_tcod.report RUN_DIR [RUN_DIR ...] --output report.html`: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tcod.report.page import build_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print its path; 2 and one line on stderr when there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m megatron_tcod.report", description="One HTML file about runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="what training wrote; several to compare")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="file to write (%(default)s)")
    parser.add_argument("--title", default="TCOD run report", help="heading of the page")
    options = parser.parse_args(arguments)
    try:
        page = build_report(options.runs, title=options.title)
        _write(options.output, page)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output.resolve()}  ({len(page.encode()) / 1e6:.1f} MB)")
    return 0


def _write(path: Path, text: str) -> None:
    # Through a neighbour, so that a reader never opens half a page.
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
