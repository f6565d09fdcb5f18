"""The picture: val NLL over the number of averaged models, and every method's difference on test."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from studies.weight_averaging.methods import LAST, SCHEDULES
from studies.weight_averaging.records import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(groups: Sequence[Group], path: Path) -> None:
    """Draw a row a model: val NLL over i under both schedules, and every method's difference on test."""
    from dnas_ens.figures.style import font, new_figure

    height = 70 + 290 * len(groups)
    figure = new_figure(960, height)
    # Unlike tight_layout it lets columns differ in the room their labels take.
    figure.set_layout_engine(
        "constrained", rect=(0, 50 / height, 1, 1 - 56 / height), wspace=0.04, hspace=0.06
    )
    axes = figure.subplots(len(groups), 3, squeeze=False, width_ratios=(1, 1, 1.1))
    for row, group in zip(axes, groups, strict=True):
        row[1].sharey(row[0])
        row[1].tick_params(labelleft=False)
        for axis, schedule in zip(row, SCHEDULES, strict=False):
            _plot_curves(axis, group, schedule)
        _plot_differences(row[2], group)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=3, frameon=False, prop=font(9))
    handles, labels = axes[0, 2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", ncols=1, frameon=False, prop=font(9))
    figure.savefig(path, dpi=110)


def _plot_curves(axis: Axes, group: Group, schedule: str) -> None:
    """Draw val NLL over i minus that of the same training's last model: mean and standard deviation over seeds."""
    from matplotlib.ticker import MaxNLocator

    from dnas_ens.figures.style import BLUE, GREEN, MUTED_COLOUR, PURPLE, VERMILION, font, style_axis

    lines = {
        "single": ("model i from the end, alone", MUTED_COLOUR, "-"),
        "equal": ("equal average of the last i", BLUE, "-"),
        "linear": ("linearly decaying average", VERMILION, (0, (6, 2))),
        "exponential": ("exponentially decaying average", GREEN, (0, (2, 1.5))),
        "ensemble": ("ensemble of the last i (predictions averaged)", PURPLE, (0, (8, 2, 2, 2))),
    }
    records = group.records[schedule]
    for name, (label, colour, style) in lines.items():
        values = np.array([record["curves"][f"{name}_nll"] for record in records])
        # A seed's own level would hide what averaging does to it.
        values -= np.array([record["curves"]["single_nll"][:1] for record in records])
        models, mean, spread = np.arange(1, values.shape[1] + 1), values.mean(axis=0), values.std(axis=0)
        axis.fill_between(models, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axis.plot(models, mean, color=colour, linestyle=style, linewidth=1.8, label=label)
    level = statistics.fmean(record["curves"]["single_nll"][0] for record in records)
    style_axis(
        axis,
        x_label="i, models from the end of the training",
        y_label="val NLL minus the last model's, nats" if schedule == SCHEDULES[0] else "",
    )
    axis.set_xlim(1, None)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, prune="lower"))
    rate = "constant rate" if schedule == SCHEDULES[0] else "cosine to 0"
    axis.set_title(
        f"{group.model}, {rate}\nlast model {level:.3f} nats", fontproperties=font(10, bold=True), loc="left"
    )


def _plot_differences(axis: Axes, group: Group) -> None:
    """Draw each method's calibrated NLL on test minus the last model's, with both intervals."""
    from dnas_ens.figures.style import BLUE, MUTED_COLOUR, TEXT_COLOUR, VERMILION, font, style_axis

    methods = [method for method in group.methods if method != LAST]
    ends = []
    for schedule, colour, offset in zip(SCHEDULES, (BLUE, VERMILION), (-0.17, 0.17), strict=True):
        for position, method in enumerate(methods):
            found = group.to_last(schedule, method)
            label = schedule if position == 0 else None
            axis.plot(found.mean, position + offset, "o", color=colour, markersize=4.5, label=label)
            axis.plot(found.over_images, [position + offset] * 2, color=colour, linewidth=3, alpha=0.55)
            axis.plot(found.over_seeds, [position + offset] * 2, color=colour, linewidth=0.9)
            ends += [*found.over_images, found.mean]
    axis.axvline(0, color=MUTED_COLOUR, linewidth=1, linestyle="--")
    style_axis(axis, x_label="test: calibrated NLL minus last model's")
    # An interval over few seeds may be far wider than anything else in the panel.
    margin = 0.35 * (max(ends) - min(ends)) + 1e-6
    axis.set_xlim(min(ends) - margin, max(ends) + margin)
    axis.locator_params(axis="x", nbins=5)
    axis.set_yticks(range(len(methods)), methods, fontproperties=font(8), color=TEXT_COLOUR)
    axis.invert_yaxis()
    axis.set_title(
        f"{group.model}, 95 % intervals\nthick: test points, thin: seeds",
        fontproperties=font(10, bold=True),
        loc="left",
    )
