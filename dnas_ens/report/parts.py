"""What a report is made of: sections of prose, tables and pictures, and figures in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from matplotlib.figure import Figure

NARROW = "\u202f"  # a narrow space that does not break, between a figure and its unit
_WORDS = (
    *("no", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawing with its words.

    Args:
        name: Of its files and on the page; a word that no other picture has.
        title: Heading above the caption's text.
        caption: HTML of what it shows and how to read it.
        description: What it shows, in plain text, for readers who cannot see it.
        shape: "panel" for half a wide page's width, "wide" for all of it, "cells" for drawings of cells, which have
            files elsewhere.
    """

    name: str
    title: str
    caption: str
    description: str
    figure: Figure
    shape: str = "panel"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page: its anchor and heading, HTML above its pictures and HTML below them."""

    name: str
    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    below: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of a page.

    Args:
        subject: Run and data, for the page's title.
        lead: Plain sentences below the headline.
        figures: Name, value and note of the few figures to remember.
    """

    subject: str
    headline: str
    lead: Sequence[str]
    figures: Sequence[tuple[str, str, str]] = ()
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def pictures(self) -> list[Picture]:
        """All pictures in order."""
        return [picture for section in self.sections for picture in section.pictures]


def table(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, label: str) -> str:
    """Return a table in a box of its own that scrolls where the page is narrow.

    Args:
        headings: HTML of the column heads.
        rows: Class of the row, and HTML of its cells; the first is the row's head.
        label: What the table holds, for readers who cannot see it.
    """
    head = "".join(f'<th scope="col">{heading}</th>' if heading else "<td></td>" for heading in headings)
    body = "".join(
        f'<tr class="{kind or "plain"}"><th scope="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>\n"
        for kind, cells in rows
    )
    return (
        f'<div class="table" role="region" aria-label="{escape(label)}" tabindex="0">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def count(number: int, noun: str) -> str:
    """Return a number with its noun, small numbers as words: "five members", "1,000 images"."""
    word = _WORDS[number] if number < len(_WORDS) else f"{number:,}"
    return f"{word} {noun if number == 1 else noun + 's'}"


def percent(share: float) -> str:
    """Return a share as per cent with its sign."""
    return f"{100 * share:.1f}{NARROW}%"


def interval(ends: tuple[float, float], *, digits: int, factor: float = 1.0, unit: str = "") -> str:
    """Return the two ends of an interval as text, empty where there is none."""
    if math.isnan(ends[0]):
        return ""
    low, high = (minus(f"{factor * end:.{digits}f}") for end in ends)
    return f"{low} to {high}{NARROW + unit if unit else ''}"


def minus(text: str) -> str:
    """Write a negative number with a minus sign rather than a hyphen."""
    return text.replace("-", "−")


def minus_signs(text: str) -> str:
    """Write the negative numbers of a sentence with minus signs."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


def duration(seconds: float) -> str:
    """Return seconds in the units people use."""
    if seconds < 100:
        return f"{seconds:.0f}{NARROW}s"
    if seconds < 5_400:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}{NARROW}min" + (f" {rest}{NARROW}s" if rest and minutes < 10 else "")
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours:,}{NARROW}h" + (f" {rest}{NARROW}min" if rest and hours < 10 else "")
