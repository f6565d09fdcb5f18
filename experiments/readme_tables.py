"""Copy the README's tables from the files that scripts wrote, so that none is written by hand.

    python experiments/readme_tables.py            # after results have changed
    python experiments/readme_tables.py --check    # exit 2 if the README does not say what the files say

A table stands between ``<!-- table {"file": "comparison-digits.md", "number": 1, "columns": ["", "accuracy %"]} -->``
and ``<!-- end of table -->``: the number-th table of a file in experiments/results/, all its columns or those whose
headings are named. A second.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnas_ens.commands.parse import parse, run_main
from dnas_ens.config import require
from dnas_ens.errors import UserError
from dnas_ens.run.files import write_atomic

PROG = "python experiments/readme_tables.py"
ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table (\{.*?\}) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the script."""

    readme: Path = ROOT / "README.md"
    """File that holds the markers."""
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


def chosen(rows: list[list[str]], columns: list[str] | None, *, file: str) -> str:
    """Return a table with some of its columns as Markdown, text to the left and figures to the right.

    Raises:
        UserError: A column the table does not have.
    """
    headings = rows[0]
    missing = [name for name in columns or [] if name not in headings]
    if missing:
        raise UserError(f"The table of {file} has no column {missing[0]!r}.", f"Choose from {headings}.")
    indices = range(len(headings)) if columns is None else [headings.index(name) for name in columns]
    kept = [[row[index] for index in indices] for row in rows]
    # A column of figures holds one in its every cell that is not empty.
    figures = [
        all(re.match(r"[-+−*<>~]*[\d.]", row[index]) for row in kept[1:] if row[index])
        for index in range(len(kept[0]))
    ]
    rule = ["--:" if is_figure else ":--" for is_figure in figures]
    return "".join("| " + " | ".join(row) + " |\n" for row in [kept[0], rule, *kept[1:]])


def filled(text: str, results: Path) -> str:
    """Return a text with all its marked tables as their files have them.

    Raises:
        UserError: A marker that cannot be read, or names what is not there.
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
        return match[1] + chosen(found[number - 1], asked.get("columns"), file=file) + match[3]

    return MARKED.sub(replacement, text)


def main(argv: list[str]) -> None:
    """Fill in the tables, or check them."""
    options = parse(Options, argv, prog=PROG, description=__doc__ or "", default=Options())
    require(options.readme.exists(), f"There is no {options.readme}.", "Name a file that holds markers.")
    text = options.readme.read_text()
    expected = filled(text, options.results)
    if options.check and expected != text:
        raise UserError(f"Tables of {options.readme} are not what their files say.", f"Run {PROG}.")
    if not options.check:
        write_atomic(options.readme, expected.encode())
    print(
        f"{'checked' if options.check else 'wrote'} the tables of {options.readme}: {len(MARKED.findall(text))}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
