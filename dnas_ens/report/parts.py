"""What a report is made of: sections of prose, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawing with its words.

    Args:
        name: Of its files and on the page; a word that no other picture has.
        title: What stands above the caption's text.
        caption: HTML of what it shows and how to read it.
        description: What it shows, in plain text, for readers who cannot see it.
        figure: The figure.
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
    """A section of the page.

    Args:
        name: Its anchor.
        title: Its heading.
        text: HTML above the pictures.
        pictures: In order.
        below: HTML below the pictures.
    """

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
        headline: One sentence.
        lead: Plain sentences below it.
        figures: Name, value and note of the few figures to remember.
        sections: In order.
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
