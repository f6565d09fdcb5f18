"""The section that shows what a budget was spent on, and what each part of it brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dnas_ens.budget.forecast import NAMES
from dnas_ens.figures import style
from dnas_ens.report import panels
from dnas_ens.report.parts import Picture, Section, count, duration, minus, table
from dnas_ens.report.run_files import RunFiles


def budget_section(files: RunFiles) -> Section | None:
    """Every unit of a budget: what it was, what it cost, and the ensemble's loss after it."""
    if files.budget is None or not files.budget["done"]:
        return None
    units, timed = files.budget["done"], files.budget["budget"]["unit"] == "seconds"
    spent = float(units[-1]["at"])
    amount, whole = (
        duration(each) if timed else count(round(each), "epoch") for each in (spent, files.budget["budget"]["total"])
    )
    each = ", each where val let expect the most for what it costs" if len(units) > 1 else ""
    text = (
        f"<p>{count(len(units), 'training').capitalize()} took {amount} of a budget of {whole}{each}. Losses are "
        "cross-fitted: the networks that join and the temperature are chosen on one half of val and scored on the "
        f"other. All networks are {files.budget['channels']} channels "
        "wide.</p>\n"
    )
    picture = Picture(
        name="budget",
        title="What the budget bought",
        caption="The ensemble’s calibrated NLL on val after every training. Down is better.",
        description=f"Line chart of the ensemble's calibrated NLL on val against cost, {len(units)} points.",
        figure=draw_budget(units, timed=timed),
        shape="wide",
    )
    return Section(
        name="budget", title="Where the budget went", text=text, pictures=[picture], below=_table(units, timed)
    )


def _table(units: Sequence[Mapping[str, Any]], timed: bool) -> str:
    body, before = [], None
    for done in units:
        unit, loss = done["unit"], float(done["loss"])
        change = "" if before is None else minus(f"{loss - before:+.4f}")
        name = f'<span class="numbered"><span>{unit["number"]}</span>{escape(_name(unit))}</span>'
        cost = duration(done["cost"]) if timed else f"{done['cost']:.0f}"
        cells = [
            name,
            str(done["epochs"]),
            cost,
            f"{done['alone']:.4f}",
            f"{loss:.4f}",
            change,
            str(len(done["members"])),
        ]
        body.append(("", cells))
        before = loss
    heads = (
        "",
        "epochs",
        "time" if timed else "cost, epochs",
        "its network alone, nats",
        "ensemble, nats",
        "change",
        "networks in it",
    )
    return table(heads, body, label="What the budget was spent on")


def _name(unit: Mapping[str, Any]) -> str:
    name = str(NAMES.get(unit["kind"], unit["kind"]))
    return f"{name} ({unit['cell']})" if unit["kind"] == "cell" else name


def draw_budget(units: Sequence[Mapping[str, Any]], *, timed: bool) -> Figure:
    """Draw the ensemble's loss against what was spent, seconds if ``timed``, else epochs, a marked point a unit."""
    spent = np.array([float(done["at"]) for done in units])
    minutes = timed and spent[-1] > 300
    spent = spent / 60 if minutes else spent
    losses = np.array([float(done["loss"]) for done in units])
    figure, axis = panels.panel(
        x_label=("minutes" if minutes else "seconds") + " spent" if timed else "epochs spent",
        y_label="calibrated NLL on val, nats",
        width=2 * panels.WIDTH - 40,
        height=290,
    )
    axis.plot(spent, losses, color=style.LINE_COLOUR, linewidth=1.2, zorder=2)
    for (kind, name), colour, marker in zip(NAMES.items(), style.CYCLE, style.MARKERS, strict=False):
        chosen = np.array([done["unit"]["kind"] == kind for done in units])
        if chosen.any():
            axis.scatter(
                spent[chosen],
                losses[chosen],
                s=42,
                color=colour,
                marker=marker,
                edgecolor="white",
                label=name,
                zorder=3,
            )
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=panels.STEPS))
    axis.margins(y=0.1)
    axis.legend(frameon=False, prop=style.font(panels.TEXT), labelcolor=style.TEXT_COLOUR, loc="upper right")
    return figure
