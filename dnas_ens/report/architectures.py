"""Sections on the architectures: every member's cells, how lambda steers them, and what their steps cost."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from dnas_ens.figures.cells import draw_genotype, operation_label
from dnas_ens.figures.plots import plot_diversity_curve
from dnas_ens.report.methods import draw_cost
from dnas_ens.report.parts import NARROW, Picture, Section, count
from dnas_ens.report.run_files import RunFiles
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.spaces import Space


def cells_section(files: RunFiles) -> Section | None:
    """The drawings of all members' cells, with what is known of each."""
    pictures = [
        Picture(
            name=f"cells-{index}",
            title=f"Member {index}",
            caption=_about(files, index),
            description=_in_words(genotype),
            figure=draw_genotype(genotype),
            shape="cells",
        )
        for index, genotype in enumerate(files.genotypes)
    ]
    if not pictures:
        return None
    networks = "network is" if len(pictures) == 1 else "networks are"
    if files.genotypes[0].rules.sums_loose_ends:
        rules = (
            "A cell’s input is the output of the cell before it; numbered nodes add up what comes in, and keep what is "
            "positive; the output is the sum of the nodes that no other node reads. Blue are dense, light blue grouped "
            "and separable"
        )
    else:
        rules = (
            "A cell’s inputs are the outputs of the two cells before it; numbered nodes add up what comes in; the "
            "output is all of them side by side. Blue are separable"
        )
    text = (
        f"<p>The {networks} stacks of these cells. {rules}, orange dilated convolutions, green poolings, purple skip "
        "connections.</p>"
    )
    title = "The cell that was found" if len(pictures) == 1 else "The cells that were found"
    return Section(name="cells", title=title, text=text, pictures=pictures)


def _about(files: RunFiles, index: int) -> str:
    """What is known of a member: its place, its distance to the base, what training made of it."""
    cell = files.genotypes[index].canonical()
    # Of a budget, and with cycles, a network's place says nothing of its cell.
    candidates: list[Mapping[str, Any]] = (files.found or {}).get("candidates", [])
    same = (each for each in candidates if Genotype.from_dict(each["genotype"]).canonical() == cell)
    candidate: Mapping[str, Any] = next(same, {})
    said = []
    if candidate.get("lam") is not None:
        said.append(f"λ = {candidate['lam']:.2f}")
        if candidate.get("direction") is not None:
            said[-1] += f" in direction {candidate['direction']}"
    if candidate.get("distance_to_base") is not None:
        said.append(f"distance to the base {candidate['distance_to_base']:.2f}")
    if candidate.get("shared_edges") is not None:
        said.append(f"{candidate['shared_edges']} edges shared with it")
    if index < len(files.members):
        member = files.members[index]
        said.append(f"{member['parameters']:,} parameters")
        if member.get("val_accuracy") is not None:
            said.append(f"{100 * member['val_accuracy']:.1f}{NARROW}% right on validation images")
    return ", ".join(said) + "." if said else ""


def _in_words(genotype: Genotype) -> str:
    """Name the operations before every node, for readers who cannot see the drawing."""
    said, rules = [], genotype.rules
    for cell_type in genotype.cell_types:
        nodes = [
            f"node {node}: "
            + " and ".join(f"{operation_label(name)} from {_source(source, rules)}" for name, source in operations)
            for node, operations in enumerate(genotype.cell(cell_type))
        ]
        said.append(f"{cell_type.capitalize()} cell, {'; '.join(nodes)}.")
    return " ".join(said)


def _source(number: int, rules: Space) -> str:
    if number < rules.num_inputs:
        return {"before_last": "the cell before the last", "last": "the last cell"}[rules.inputs[number]]
    return f"node {number - rules.num_inputs}"


def steering_section(files: RunFiles) -> Section | None:
    """Distance to the base and shared edges against lambda."""
    curve = (files.found or {}).get("curve")
    if not curve:
        return None
    shared, direction = curve.get("shared_edges"), curve.get("direction")
    objective = files.config.get("search", {}).get("objective", {})
    # Other penalties read lambda as a number of edges, or as a weight.
    asked = objective.get("penalty", "js-pairwise") == "js-pairwise"
    figure = plot_diversity_curve(
        curve["lam"], curve["distance_to_base"], shared, directions=direction, is_distance=asked
    )
    directions = len(set(direction or [0]))
    lines = f"One line for each of {count(directions, 'direction')}" if directions > 1 else "There is one direction"
    below = "; below, the edges that the discrete cells share with it" if shared else ""
    picture = Picture(
        name="diversity",
        title="Distance D and shared edges against λ",
        caption=f"{lines}{'; the dashed diagonal is what was asked for' if asked else ''}. The distance D is that of "
        f"the relaxed architecture to the base, 0 for the same and 1 for nothing in common{below}.",
        description=f"Line chart of the distance to the base against lambda{' beside the diagonal' if asked else ''}, "
        "and below it the number of shared edges.",
        figure=figure,
        shape="wide",
    )
    meaning = (
        "λ asks how far from it each should lie."
        if asked
        else f"with the penalty {escape(str(objective['penalty']))} λ is not a distance, so only the trend tells."
    )
    text = f"<p>The search learns paths of architectures away from a base: {meaning}</p>"
    return Section(name="steering", title="Does λ steer diversity?", text=text, pictures=[picture])


def step_time_section(files: RunFiles) -> Section | None:
    """Validation loss against the expected time of a step, of trained members, else of all scored candidates."""
    found = files.found or {}
    timed = {
        Genotype.from_dict(each["genotype"]).canonical(): each
        for each in found.get("candidates", [])
        if each.get("expected_step_ms") is not None
    }
    cells = [genotype.canonical() for genotype in files.genotypes]
    pairs = zip(cells, files.members, strict=False)
    points = [
        (timed[cell]["expected_step_ms"], member["val_nll"], f"member {index}")
        for index, (cell, member) in enumerate(pairs)
        if cell in timed and member.get("val_nll") is not None
    ]
    trained = len(points) > 1
    if not trained:
        names = {cell: f"member {index}" for index, cell in enumerate(cells)}
        points = [
            (each["expected_step_ms"], each["supernet_val_nll"], names.get(cell, ""))
            for cell, each in timed.items()
            if each.get("supernet_val_nll") is not None
        ]
    if len(points) < 2:
        return None
    cost, loss, labels = zip(*points, strict=True)
    weights = "trained from scratch" if trained else "with the supernet’s weights"
    kind = "members" if trained else "candidates"
    picture = Picture(
        name="step-time",
        title="NLL on validation images against the time of a step",
        caption=f"The {kind}, {weights}. The time of a training step is the sum of what each operation took at its "
        "place when it was measured before the search. No network is both faster and better than one on the line.",
        description=f"Scatter plot of {len(points)} {kind}: step times from {min(cost):.1f} to {max(cost):.1f} "
        f"milliseconds, losses from {min(loss):.3f} to {max(loss):.3f} nats.",
        figure=draw_cost(
            cost,
            loss,
            labels=labels,
            ours=[bool(label) for label in labels],
            x_label="expected time of a training step, ms",
            y_label="NLL on val, nats",
        ),
        shape="wide",
    )
    text = "<p>The search asked for networks that earn their seconds: a cheap step, and little loss.</p>"
    return Section(name="step-time", title="What does a step cost?", text=text, pictures=[picture])
