"""How do time and memory of a step of the search grow with width, depth, batch, members and directions?

    python experiments/benchmarks/growth.py

One axis at a time around the default search on digits (C=8, 3 cells, B=64, m=4, R=5): channels C, cells, batch B and
members m by the step of search_step.py, ours against the textbook on the same images; directions R by a real step of
``dnas_ens.search.loop.SearchLoop``, which adds augmentation, objective and optimisers. The loop's other side there is
the reference supernet with separate passes and PyTorch's depthwise gradients; it shares the loop's layout,
channels_last, and runs backward once, so it takes more memory than the textbook of the other axes.
Writes OUTPUT.md and OUTPUT.png, of this run, and appends a line to OUTPUT.jsonl. Five to ten minutes on two CPU cores.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from search_step import OURS, SAME_IMAGES, SETTINGS, SearchStep, build_step
from timing import (
    MEBIBYTE,
    RESULTS,
    Build,
    Side,
    TrainingOptions,
    measure,
    parse_benchmark,
    report,
    synchronise,
    tell,
)

from dnas_ens.commands.parse import run_main
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.run.files import with_ending

if TYPE_CHECKING:
    import torch

    from dnas_ens.data import ImageData, Split

IN_LOOP = "reference in the loop"
Axis = Literal["channels", "cells", "batch", "members", "directions"]
#: Every axis by the option that gives its values, as it is called in table and plot.
AXES: dict[Axis, str] = {
    "channels": "channels C",
    "cells": "cells",
    "batch": "batch B",
    "members": "members m",
    "directions": "directions R",
}
#: Which field of the step an axis changes; directions are known to the loop alone.
STEP_FIELDS = {"channels": "channels", "cells": "num_cells", "batch": "batch_size", "members": "members"}


@dataclass(frozen=True, kw_only=True)
class Growth(TrainingOptions):
    """Options of the benchmark."""

    rounds: int = 7
    """Rounds timed at every point; both sides run once in each."""
    warmup: int = 2
    """Rounds before them, not counted."""
    axes: tuple[Axis, ...] = tuple(AXES)
    """Axes to go along."""
    channels: tuple[int, ...] = (4, 8, 16)
    """C of the first cell."""
    cells: tuple[int, ...] = (3, 5, 8)
    """Cells in the stack."""
    batch: tuple[int, ...] = (32, 64, 128)
    """B, images of a pass of ours, a multiple of four members."""
    members: tuple[int, ...] = (1, 2, 4, 8)
    """m, members of a step."""
    directions: tuple[int, ...] = (1, 4, 8)
    """R of the hypernetwork."""
    output: Path = RESULTS / "growth"
    """Where table, plot and lines go: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl."""


@dataclass(frozen=True, kw_only=True)
class LoopStep(TrainingOptions):
    """A step of the real loop."""

    directions: int
    """R of the hypernetwork."""


def few_digits(batch_size: int) -> ImageData:
    """Return digits of which an epoch is a single step, so that single steps can take turns."""
    from dnas_ens.data import ImageData, Split, load_data

    digits = load_data("digits")

    def some(split: Split, count: int) -> Split:
        return Split(split.images[:count], split.labels[:count])

    return ImageData.from_splits(
        "digits of one step",
        digits.classes,
        train=some(digits.train, 2 * batch_size),
        val=some(digits.val, batch_size),
        test=some(digits.test, batch_size),
        flip=digits.flip,
    )


def build_loop_step(side: str, options: LoopStep, device: torch.device) -> Side:
    """Return the timed step of a side's loop, with its data and optimisers, without what an epoch ends in."""
    from dnas_ens.nn.depthwise import native_depthwise
    from dnas_ens.search.loop import SearchLoop

    config = with_fields(
        search_preset("smoke", space="darts"),
        directions=options.directions,
        warmup_epochs=0,
        # More than are run, so that no schedule ends.
        epochs=options.warmup + options.rounds + options.memory_steps + 1,
    )
    if side == IN_LOOP:
        config = with_fields(config, form="reference", passes="separate")
    loop = SearchLoop(config, few_digits(config.bilevel.batch_size), device=device)

    def step() -> float:
        taken: list[float] = []

        def note(_: int) -> None:
            synchronise(device)
            taken.append(time.perf_counter() - start)

        synchronise(device)
        with native_depthwise() if side == IN_LOOP else nullcontext():
            start = time.perf_counter()
            loop.run_epoch(note)
        return taken[0]

    return step


def measure_axes(options: Growth) -> list[dict[str, Any]]:
    """Measure every point of every axis; one that axes share is measured once."""
    common = {entry.name: getattr(options, entry.name) for entry in fields(TrainingOptions)}
    centre = SearchStep(**SETTINGS["digits"], **common)
    known: dict[TrainingOptions, dict[str, Any]] = {}
    points = []
    for axis in options.axes:
        for value in getattr(options, axis):
            point: TrainingOptions = LoopStep(directions=value, **common)
            build: Build = build_loop_step
            other = IN_LOOP
            if axis != "directions":
                changed: dict[str, Any] = {STEP_FIELDS[axis]: value}
                point, build, other = replace(centre, **changed), build_step, SAME_IMAGES
            if point not in known:
                known[point] = measure(build, point, (other, OURS), ours=OURS)
            points.append({"axis": axis, "value": value, "other": other, **known[point]})
            tell(table(points[-1:]).splitlines()[-1])
    return points


def table(points: list[dict[str, Any]]) -> str:
    """Return all points as Markdown."""
    lines = [
        "| axis | value | other side | other side, ms | ours, ms | time, other / ours (quartiles) "
        "| other, MiB added | ours, MiB added | memory, ours / other |",
        "|:--|--:|:--" + "|--:" * 6 + "|",
    ]
    for point in points:
        sides = [point["sides"][name] for name in (point["other"], OURS)]
        (quotient,) = point["time_ratios"].values()
        memory = ["", "", ""]
        if point["memory_ratios"]:
            (share,) = point["memory_ratios"].values()
            memory = [f"{side['peak_memory']['added_bytes'] / MEBIBYTE:.1f}" for side in sides]
            memory.append("" if share is None else f"{share:.2f}")
        cells = [
            AXES[point["axis"]],
            str(point["value"]),
            point["other"],
            *(f"{1000 * side['seconds']['median']:.1f}" for side in sides),
            f"{quotient['ratio']:.2f} ({quotient['lower_quartile']:.2f} to {quotient['upper_quartile']:.2f})",
            *memory,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against every axis, a column an axis, both scales logarithmic."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from dnas_ens.figures.style import BLUE, MUTED_COLOUR, VERMILION, font, new_figure, style_axis

    looks: dict[str, dict[str, Any]] = {
        SAME_IMAGES: {"color": VERMILION, "linestyle": "-"},
        IN_LOOP: {"color": VERMILION, "linestyle": "--"},
        OURS: {"color": BLUE, "linestyle": "-"},
    }
    axes = list(dict.fromkeys(point["axis"] for point in points))
    with_memory = all(point["memory_ratios"] for point in points)
    rows = ["milliseconds a step", "MiB a step adds"][: 2 if with_memory else 1]
    height = 190 * len(rows) + 50
    figure = new_figure(max(165 * len(axes), 350), height)
    grid = figure.subplots(len(rows), len(axes), squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for column, axis in enumerate(axes):
        chosen = sorted((point for point in points if point["axis"] == axis), key=lambda point: point["value"])
        values = [point["value"] for point in chosen]
        for name in (chosen[0]["other"], OURS):
            look = looks[name] | {"marker": "o", "markersize": 4, "linewidth": 1.5}
            seconds = [point["sides"][name]["seconds"] for point in chosen]
            median, lower, upper = (
                [1000 * entry[key] for entry in seconds] for key in ("median", "lower_quartile", "upper_quartile")
            )
            (handles[name],) = grid[0, column].plot(values, median, **look)
            grid[0, column].fill_between(values, lower, upper, color=look["color"], alpha=0.2, linewidth=0)
            if with_memory:
                peaks = [point["sides"][name]["peak_memory"] for point in chosen]
                grid[1, column].plot(values, [peak["added_bytes"] / MEBIBYTE for peak in peaks], **look)
        for row, y_label in enumerate(rows):
            panel = grid[row, column]
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            last = row == len(rows) - 1
            style_axis(panel, x_label=AXES[axis] if last else "", y_label=y_label if column == 0 else "")
            panel.xaxis.set_major_locator(FixedLocator(values))
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for scale in (panel.xaxis, panel.yaxis):
                scale.set_minor_locator(NullLocator())
                scale.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    shown = [name for name in looks if name in handles]
    legend = figure.legend(
        [handles[name] for name in shown],
        shown,
        loc="upper center",
        ncols=len(shown),
        frameon=False,
        prop=font(9),
        labelcolor=MUTED_COLOUR,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 24 / height))
    legend.set_in_layout(False)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    from dnas_ens.compare.report import provenance

    options = parse_benchmark("growth", __doc__, Growth(), argv)
    points = measure_axes(options)
    lines = replace(options, output=with_ending(options.output, ".jsonl"))
    env = report("growth", argv, lines, {"points": points})
    card = env["cuda_device"] if points[0]["device"].startswith("cuda") else "no GPU"
    hardware = f"{card}, {points[0]['threads']} threads"
    text = (
        "# How a step of the search grows (digits)\n\n"
        f"{provenance(env, hardware=hardware)}\n\n"
        f"Around C=8, 3 cells, B=64, m=4. Medians of {options.rounds} rounds in which both sides take turns; "
        "quartiles of the quotients round by round. Memory: what the first steps add to the peak of a process "
        "that holds the model, each side alone. *textbook, same images* is the reference supernet with a pass "
        "for each member over its share of the batch, each followed by its backward pass; *reference in the "
        "loop*, for R, is the search loop with the reference supernet, separate passes and one backward pass."
        "\n\n" + table(points)
    )
    with_ending(options.output, ".md").write_text(text)
    plot(points, with_ending(options.output, ".png"))
    tell(f"wrote {options.output}.md, .png and .jsonl")


if __name__ == "__main__":
    sys.exit(run_main(main))
