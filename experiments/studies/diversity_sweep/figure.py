"""The picture of the five studies: both ways of steering, ensembles, deviations, search curves and schedules."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dnas_ens.figures.style import BLUE, MUTED_COLOUR, VERMILION, font, new_figure
from studies.diversity_sweep.searches import (
    COLD,
    CONSTANT,
    LIMITS,
    RETRAINED_LIMITS,
    RETRAINED_POINTS,
    SETTINGS,
    STEERED,
)
from studies.diversity_sweep.tables import SHOWN_POINTS, WEIGHTS, Figures, Key
from studies.plotting import handle, panel

ACCURACY = "test accuracy, %"


def plot(figures: Figures, path: Path) -> None:
    """Draw paths on the left, ensembles and samples in the middle, schedules and search curves on the right."""
    figure = new_figure(980, 500)
    axes = figure.subplots(2, 4)
    for column, way in enumerate(STEERED):
        _paths(figures, way, axes[:, column])
    _limits(figures, axes[0, 2])
    _deviations(figures, axes[1, 2])
    _schedules(figures, axes[0, 3])
    _curves(figures, axes[1, 3])
    lowest = min(axis.get_ylim()[0] for axis in axes[0, :2])
    for axis in axes[0, :2]:
        axis.set_ylim(lowest, 101)
    handles = [
        *(handle(way, color=_colour(way), linewidth=3) for way in STEERED),
        handle(WEIGHTS[0], marker="o", markerfacecolor="white", linestyle="--"),
        handle(WEIGHTS[1], marker="o"),
        handle("random deviations", marker="X", linestyle="", markersize=8),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, prop=font(9.5))
    figure.tight_layout(rect=(0, 0.055, 1, 1), w_pad=1.6, h_pad=1.6)
    figure.savefig(path, dpi=110)


def _colour(setting: str) -> str:
    return BLUE if setting.startswith(STEERED[0]) else VERMILION


def _line(
    axis: Axes,
    figures: Figures,
    places: Sequence[float],
    keys: Sequence[Key],
    *,
    shift: float = 0.0,
    marker: str = "o",
) -> None:
    """Draw mean and, as bars, standard deviation over seeds of groups; missing ones are left out."""
    found = [
        (place, figures.groups[key].figures["test_accuracy"])
        for place, key in zip(places, keys, strict=True)
        if key in figures.groups
    ]
    if not found:
        return
    inherited = keys[0][3] == WEIGHTS[0]
    colour = _colour(keys[0][1])
    axis.errorbar(
        [place + shift for place, _ in found],
        [100 * statistics.fmean(values) for _, values in found],
        [100 * statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in found],
        color=colour,
        marker=marker,
        markersize=8 if marker == "X" else 5.5,
        markerfacecolor="white" if inherited else colour,
        markeredgecolor=colour if inherited or marker != "X" else "white",
        linestyle="" if marker == "X" else "--" if inherited else "-",
        linewidth=1.6,
        elinewidth=1,
        capsize=2,
        zorder=2 if inherited else 3,
    )


def _paths(figures: Figures, way: str, axes: np.ndarray) -> None:
    top, bottom = axes
    records = figures.searches(way)
    largest = records[0]["config"]["hypernetwork"]["max_lambda"]
    for weights, shares in zip(WEIGHTS, (SHOWN_POINTS, RETRAINED_POINTS), strict=True):
        places = [share * largest for share in shares]
        keys: list[Key] = [("path", way, share, weights) for share in shares]
        _line(top, figures, places, keys)
    edges = figures.num_edges(way)
    for record in records:
        for direction in range(record["config"]["hypernetwork"]["directions"]):
            path = [point for point in record["points"] if point["direction"] == direction]
            bottom.plot(
                [point["lam"] for point in path],
                [point["shared"] for point in path],
                color=_colour(way),
                alpha=0.45,
                linewidth=1.4,
            )
    if way != STEERED[0]:
        ends = [0, min(largest, edges)]
        bottom.plot(ends, ends, color=MUTED_COLOUR, linestyle=":", linewidth=1.4)
        where = 0.62 * ends[1], 0.5 * ends[1]
        bottom.text(*where, "asked for", color=MUTED_COLOUR, fontproperties=font(9), va="top")
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_ylim(-0.03 * edges, 1.05 * edges)
    meaning = "distance to the base" if way == STEERED[0] else "edges to share"
    panel(top, f"a. {way}: accuracy along λ", y_label=ACCURACY, size=9.5)
    labels = {"x_label": f"λ ({meaning})", "y_label": "edges shared with the base"}
    panel(bottom, f"a. {way}: edges, a line a path", **labels, size=9.5)


def _limits(figures: Figures, axis: Axes) -> None:
    for position, way in enumerate(STEERED):
        for weights, shares in zip(WEIGHTS, (LIMITS, RETRAINED_LIMITS), strict=True):
            keys: list[Key] = [("ensemble", way, share, weights) for share in shares]
            _line(axis, figures, shares, keys, shift=0.016 * position)
    axis.set_xticks(LIMITS, ["¼", "½", "¾", "1"])
    panel(axis, "b. ensembles of λ ≤ Λ", x_label="limit Λ, share of the range", y_label=ACCURACY, size=9.5)


def _deviations(figures: Figures, axis: Axes) -> None:
    for position, way in enumerate(STEERED):
        numbers = figures.sample_numbers(way, "retrained")
        for kind, marker in (("samples", "o"), ("deviations", "X")):
            keys: list[Key] = [(kind, way, number, "retrained") for number in numbers]
            if keys:
                shift = 0.14 * position + (0.07 if kind == "deviations" else 0.0) - 0.1
                _line(
                    axis,
                    figures,
                    numbers,
                    keys,
                    shift=shift,
                    marker=marker,
                )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = {"x_label": "edges shared with the base", "y_label": ACCURACY}
    panel(axis, "d. single networks, retrained", **labels, size=9.5)


def _curves(figures: Figures, axis: Axes) -> None:
    epochs: list[int] = []
    for setting in SETTINGS:
        epochs, losses = figures.epoch_losses(setting)
        style = "-" if setting in STEERED else "--" if CONSTANT in setting else ":"
        axis.plot(
            epochs,
            losses.mean(axis=(0, 2)),
            color=_colour(setting),
            linestyle=style,
            linewidth=2 if setting in STEERED else 1.4,
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=8, length=2, colors=MUTED_COLOUR)
    labels = {"x_label": "search epoch", "y_label": "val NLL, nats"}
    panel(axis, "e. inherited ensemble, val", **labels, size=9.5)
    axis.set_xticks(epochs)
    styles = {"as it is": "-", CONSTANT: "--", COLD: ":"}
    handles = [handle(name, linestyle=style) for name, style in styles.items()]
    axis.legend(handles=handles, frameon=False, prop=font(8))


def _schedules(figures: Figures, axis: Axes) -> None:
    changes = ("", f", {CONSTANT}", f", {COLD}")
    for side, way in zip((-0.1, 0.1), STEERED, strict=True):
        for position, change in enumerate(changes):
            for weights in WEIGHTS:
                keys: list[Key] = [("ensemble", f"{way}{change}", 1.0, weights)]
                _line(axis, figures, [position], keys, shift=side)
    panel(axis, "c. ensembles, largest Λ", y_label=ACCURACY, size=9.5)
    axis.set_xlim(-0.5, len(changes) - 0.5)
    axis.set_xticks(range(len(changes)), ["as it is", "constant\nschedules", "no warm-up\nepochs"])
