"""The page: one HTML file that asks for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

from dnas_ens.figures.style import to_svg
from dnas_ens.report.inline_svg import inline_svg
from dnas_ens.report.parts import Picture, Report, Section
from dnas_ens.report.stylesheet import STYLESHEET

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$stylesheet</style>
</head>
<body>
<div class="page">
<header>
<p class="subject">$subject</p>
<h1>$headline</h1>
$lead$key$contents</header>
<main>
$sections</main>
</div>
</body>
</html>
""")


def render(report: Report) -> str:
    """Return the page of a report."""
    return _PAGE.substitute(
        title=escape(f"{report.subject} · report"),
        stylesheet=STYLESHEET,
        subject=escape(report.subject),
        headline=escape(report.headline),
        lead=_lead(report.lead),
        key=_key(report.figures),
        contents=_contents(report.sections),
        sections="".join(_section(section) for section in report.sections),
    )


def _lead(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return '<div class="lead">\n' + "".join(f"<p>{escape(each)}</p>\n" for each in sentences) + "</div>\n"


def _key(figures: Sequence[tuple[str, str, str]]) -> str:
    if not figures:
        return ""
    listed = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        + (f'<dd class="remark">{escape(remark)}</dd>' if remark else "")
        + "</div>\n"
        for name, value, remark in figures
    )
    return f'<dl class="key">\n{listed}</dl>\n'


def _contents(sections: Sequence[Section]) -> str:
    if len(sections) < 2:
        return ""
    links = "".join(f'<li><a href="#{each.name}">{escape(each.title)}</a></li>\n' for each in sections)
    return f'<nav aria-label="Contents">\n<ul>\n{links}</ul>\n</nav>\n'


def _section(section: Section) -> str:
    pictures = "".join(_figure(picture) for picture in section.pictures)
    if pictures:
        kind = ""
        if len(section.pictures) == 1:
            kind = " single"
        elif section.pictures[0].shape == "cells":
            kind = " of-cells"
        pictures = f'<div class="pictures{kind}">\n{pictures}</div>\n'
    heading = f'<h2 id="{section.name}">{escape(section.title)}</h2>\n'
    return f'<section aria-labelledby="{section.name}">\n{heading}{section.text}{pictures}{section.below}</section>\n'


def _figure(picture: Picture) -> str:
    drawing = inline_svg(
        to_svg(picture.figure, outlines=False),
        name=picture.name,
        title=picture.title,
        description=picture.description,
    )
    caption = f"<strong>{escape(picture.title)}.</strong> {picture.caption}".strip()
    scrolls = (
        f' role="region" aria-label="{escape(picture.title)}" tabindex="0"'
        if picture.shape != "panel"
        else ""
    )
    return (
        f'<figure class="{picture.shape}">\n<div class="drawing"{scrolls}>{drawing}</div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>\n"
    )
