"""The page, one HTML file that asks for nothing else, and its figures as SVG and PNG files and TensorBoard images."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from dnas_ens.figures.cells import save_cells
from dnas_ens.figures.style import save_svg, to_svg
from dnas_ens.report.build import build_report
from dnas_ens.report.inline_svg import inline_svg
from dnas_ens.report.parts import Picture, Report, Section
from dnas_ens.report.run_files import RunFiles
from dnas_ens.run.files import unwritable, write_atomic
from dnas_ens.run.metrics_log import MetricsLog

PIXELS_PER_INCH = 160
PHASE = "report"
#: One column, the reader's own font, light or dark as the reader's system is, and on paper.
STYLESHEET = Path(__file__).with_name("page.css")


def write(folder: Path) -> Path:
    """Write report.html, figures/ and the TensorBoard images of a run folder; see `dnas_ens.report.write_report`."""
    with warnings.catch_warnings():
        # Names may hold letters that the house font lacks; in the page the reader's own fonts have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        files = RunFiles.load(folder)
        report = build_report(files)
        page = render(report)
        _draw_members(files)
        pictures = [picture for picture in report.pictures if picture.shape != "cells"]
        for picture in pictures:
            _write_files(picture, folder / "figures")
        _write_tensorboard(pictures, folder)
    write_atomic(folder / "report.html", page.encode(errors="backslashreplace"))
    return folder / "report.html"


def _draw_members(files: RunFiles) -> None:
    """Draw the cells of the ensemble's networks: those that the search has drawn, or more, or those of a budget."""
    if files.ensemble is None:
        return
    drawn = {files.folder / f"cells/member-{index}.svg": genotype for index, genotype in enumerate(files.genotypes)}
    for path, genotype in drawn.items():
        save_cells(genotype, path, title=path.stem.replace("-", " ").capitalize())
    for path in files.folder.glob("cells/member-*.svg"):
        if path not in drawn:
            path.unlink()


def _write_files(picture: Picture, folder: Path) -> None:
    save_svg(picture.figure, folder / f"{picture.name}.svg", title=picture.title)
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH, metadata={"Software": None})
    write_atomic(folder / f"{picture.name}.png", buffer.getvalue())


def _write_tensorboard(pictures: Sequence[Picture], folder: Path) -> None:
    """Replace the images of an earlier report."""
    log = MetricsLog(folder)
    try:
        if (log.tensorboard / PHASE).is_dir():
            shutil.rmtree(log.tensorboard / PHASE)
        for picture in pictures:
            log.add_figure(picture.name, picture.figure, step=0, phase=PHASE)
    except OSError as error:
        raise unwritable(log.tensorboard / PHASE, error) from error
    finally:
        log.close()


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$stylesheet</style>
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
        stylesheet=STYLESHEET.read_text("utf-8"),
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
    scrolls = f' role="region" aria-label="{escape(picture.title)}" tabindex="0"' if picture.shape != "panel" else ""
    return (
        f'<figure class="{picture.shape}">\n<div class="drawing"{scrolls}>{drawing}</div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>\n"
    )
