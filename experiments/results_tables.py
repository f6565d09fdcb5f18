"""Copy the tables of the Markdown pages from the files that scripts wrote, so that none is typed by hand.

    python experiments/results_tables.py            # after results have changed
    python experiments/results_tables.py --check    # exit 2 if a page does not say what the files say

A table stands between ``<!-- table {"file": "comparison-digits.md", "number": 1, "columns": ["", "accuracy %"]} -->``
and ``<!-- end of table -->``. It is the number-th table of a file in experiments/results/: all of it, or the named
columns and the rows whose first cell is named under "rows", in that order. A second.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnas_ens.commands.parse import parse, run_main
from dnas_ens.config import require
from dnas_ens.errors import UserError
from dnas_ens.run.files import write_atomic

PROG = "python experiments/results_tables.py"
ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / name for name in ("README.md", "experiments/results/README.md", "docs/performance.md"))
MARKED = re.compile(r"(<!-- table (\{.*?\}) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the script."""

    pages: tuple[Path, ...] = PAGES
    """Files that hold the markers."""
    results: Path = ROOT / "experiments" / "results"
    """Folder of the files with the tables."""
    check: bool = False
    """Change nothing; fail if a table is not what its file says."""


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every Markdown table of a text, the headings first, the rule left out."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return [[rows[0], *rows[2:]] for rows in found]


def positions(names: Sequence[str], wanted: Sequence[str] | None, *, what: str, file: str) -> list[int]:
    """Return where the wanted names stand, or all positions where none are asked for.

    Raises:
        UserError: A name the table does not have.
    """
    missing = [name for name in wanted or [] if name not in names]
    if missing:
        raise UserError(f"The table of {file} has no {what} {missing[0]!r}.", f"Choose from {list(names)}.")
    return list(range(len(names))) if wanted is None else [names.index(name) for name in wanted]


def as_markdown(table: list[list[str]]) -> str:
    """Return a table as Markdown, text to the left and figures to the right."""
    # A column holds figures if each of its cells that is not empty begins like one.
    figures = [
        all(re.match(r"[-+−*<>~]*[\d.]", cell) for cell in column[1:] if cell) for column in zip(*table, strict=True)
    ]
    rule = ["--:" if is_figure else ":--" for is_figure in figures]
    return "".join("| " + " | ".join(row) + " |\n" for row in [table[0], rule, *table[1:]])


def filled(text: str, results: Path) -> str:
    """Return a text with all its marked tables as their files have them.

    Raises:
        UserError: A marker that cannot be read, or one that names a file, table, column or row that does not exist.
    """

    def replacement(match: re.Match[str]) -> str:
        try:
            asked: dict[str, Any] = json.loads(match[2])
            file, number = str(asked["file"]), int(asked.get("number", 1))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The marker {match[1].strip()} cannot be read ({error!r}).", "See --help for its form."
            ) from error
        if not (results / file).exists():
            raise UserError(f"There is no {results / file}.", "Run the script that writes it.")
        found = tables((results / file).read_text())
        if not 1 <= number <= len(found):
            raise UserError(f"{file} has {len(found)} tables, not {number}.", "Number them from 1.")
        headings, *body = found[number - 1]
        columns = positions(headings, asked.get("columns"), what="column", file=file)
        rows = positions([row[0] for row in body], asked.get("rows"), what="row", file=file)
        chosen = [headings, *(body[row] for row in rows)]
        return match[1] + as_markdown([[row[column] for column in columns] for row in chosen]) + match[3]

    return MARKED.sub(replacement, text)


def main(argv: list[str]) -> None:
    """Fill in the tables, or check them."""
    options = parse(Options, argv, prog=PROG, description=__doc__ or "", default=Options())
    for page in options.pages:
        require(page.exists(), f"There is no {page}.", "Name files that hold markers.")
        text = page.read_text()
        expected = filled(text, options.results)
        if options.check and expected != text:
            raise UserError(f"Tables of {page} are not what their files say.", f"Run {PROG}.")
        if not options.check:
            write_atomic(page, expected.encode())
        print(f"{'checked' if options.check else 'wrote'} the tables of {page}: {len(MARKED.findall(text))}")


if __name__ == "__main__":
    sys.exit(run_main(main))
