"""Tables and sentences of the study."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dnas_ens.compare.report import Column, markdown_table, provenance
from dnas_ens.metrics.significance import CONFIDENCE, NUM_RESAMPLES
from studies.loss_landscape.landscape import PairContrast
from studies.loss_landscape.measures import KINDS, PAIR_MEASURES, SEEDS, Found, score

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")


def solutions_table(found: Found) -> str:
    """Return accuracies of every architecture's solutions as Markdown."""
    rows = []
    for position, architecture in enumerate(found.bench.architectures):
        own = [one for one in found.solutions if one.architecture == position]
        accuracies = [score(found.predictions, [one.index])[0] for one in own]
        seconds = np.mean([one.record["cpu_seconds"] for one in own])
        percent = Column("", factor=100, digits=2).cell(accuracies)
        rows.append([architecture.name, f"{own[0].record['parameters']:,}", percent, f"{seconds:.1f}"])
    return markdown_table(["architecture", "parameters", "test accuracy %", "CPU s a training"], rows)


def space_table(found: Found) -> str:
    """Return how far apart checkpoints and seeds of the first architecture are, in weights and on val."""
    landscape, count = found.landscape, len(found.solutions[0].states)
    trajectories = len(landscape.cosines) // count
    late = range(count // 2, count)
    within = [
        (t * count + first, t * count + second)
        for t in range(trajectories)
        for first, second in itertools.combinations(late, 2)
    ]
    ends = [t * count + count - 1 for t in range(trajectories)]
    rows = {
        f"checkpoints of one trajectory, from epoch {found.solutions[0].epochs[count // 2]} on": within,
        "beginning and end of one trajectory": [(end - count + 1, end) for end in ends],
        "seeds, at the end": list(itertools.combinations(ends, 2)),
    }
    matrices = (landscape.cosines, landscape.disagreement, landscape.normalised, landscape.of_independent)
    lines = []
    for name, pairs in rows.items():
        first, second = np.array(pairs).T
        means = [float(matrix[first, second].mean()) for matrix in matrices]
        lines.append([name, f"{means[0]:.3f}", f"{100 * means[1]:.2f}", *(f"{each:.3f}" for each in means[2:])])
    header = [
        "pairs, on val",
        "cosine of weights",
        "disagreement %",
        "normalised disagreement",
        "over independent errors'",
    ]
    return markdown_table(header, lines)


def contrast_table(rows: dict[str, tuple[PairContrast, float]], kind: str) -> str:
    """Return seed pairs beside pairs of a kind as Markdown."""
    lines = []
    for name, (contrast, p_value) in rows.items():
        factor, unit, digits = (100.0, " %", 2) if name in ("disagreement", "shared errors") else (1.0, "", 4)
        within, between, difference = (
            factor * value for value in (contrast.within, contrast.between, contrast.difference)
        )
        lines.append(
            [
                name,
                f"{within:.{digits}f}{unit}",
                f"{between:.{digits}f}{unit}",
                f"{difference:+.{digits}f}{unit}",
                f"{p_value:.2g}",
            ]
        )
    return markdown_table(["on test", "seed pairs", f"{kind[:-1]} pairs", "difference", "p (Holm)"], lines)


def answer(rows: dict[str, tuple[PairContrast, float]], kind: str) -> str:
    """Say in plain words whether members of a kind are further apart than seeds."""
    primary = next(iter(PAIR_MEASURES))
    contrast, p_value = rows[primary]
    one, level = kind[:-1], 1.0 - CONFIDENCE
    smallest = min(contrast.num_groupings, NUM_RESAMPLES + 1)
    share = 100.0 * contrast.difference / contrast.within if contrast.within > 0.0 else 0.0
    figures = f"{primary} {contrast.between:.3f} against {contrast.within:.3f}, {share:+.1f} %, p {p_value:.2g}"
    subject = f"members of different {kind}"
    if p_value > level:
        verdict = (
            f"**Not shown: {subject} and seeds of one {one} are not distinguishable in how far they sit apart, "
            f"once their errors are counted** ({figures})."
        )
    else:
        word = "further apart" if contrast.difference > 0.0 else "closer together"
        verdict = (
            f"**{subject.capitalize()} sit {word} in function space than seeds of one {one}** ({figures}): seeds "
            f"alone have {100 * contrast.within / contrast.between:.0f} % of that distance."
        )
    others = [
        f"{name} ({100 * other.difference / other.within:+.1f} %, p {p:.2g})"
        if other.within > 0.0
        else f"{name} (p {p:.2g})"
        for name, (other, p) in rows.items()
        if name != primary
    ]
    return (
        f"{verdict} The other measures: {', '.join(others)}; fewer shared errors mean further apart, and "
        f"the NLL says what two averaged are worth. p is of a "
        f"permutation of members over {kind}, because pairs that share a member are not independent, with "
        f"Holm's correction for {len(rows)} measures; before it, none can be below 1 / {smallest:,}. "
        "Every architecture has as many seeds, so both kinds of pairs have the same mean error rate; dividing by the "
        f"errors of each pair also evens out unequal {kind}. It is about these {kind} and these test images.\n"
    )


def at_equal_size(found: Found) -> str:
    """Say how ensembles of different architectures and of seeds compare at the largest size that both have."""
    parts = []
    for name, rows in found.sizes.items():
        if not name.endswith(KINDS):
            continue
        seeds = found.sizes[name.removesuffix(KINDS) + SEEDS]
        size = min(len(seeds), len(rows))
        ours, theirs = rows[size - 1], seeds[size - 1]
        parts.append(
            f"{name.removesuffix(KINDS).removesuffix(': ') or 'Architectures'} at {size} networks: calibrated NLL "
            f"{ours['calibrated_nll']:.4f} of different ones against {theirs['calibrated_nll']:.4f} of seeds, accuracy "
            f"{100 * ours['accuracy']:.2f} against {100 * theirs['accuracy']:.2f} % (the same networks, "
            f"{ours['ensembles']:.0f} and {theirs['ensembles']:.0f} ensembles of them; not tested)."
        )
    return " ".join(parts)


def shared_edges(found: Found) -> str:
    """Say how many edges the genotypes have in common, pair by pair."""
    genotypes = [one.genotype for one in found.bench.architectures if one.genotype is not None]
    if len(genotypes) < 2:
        return ""
    shared = [first.shared_edges(second) for first, second in itertools.combinations(genotypes, 2)]
    return (
        f"Two of the genotypes share {np.mean(shared):.1f} of {genotypes[0].num_edges} edges on average, from "
        f"{min(shared)} to {max(shared)}.\n\n"
    )


def sizes_table(found: Found) -> str:
    """Return ensembles of every size as Markdown."""
    return markdown_table(
        ["ensemble of", "size", "ensembles averaged", "accuracy %", "NLL", "calibrated NLL"],
        [
            [
                name,
                f"{row['size']:.0f}",
                f"{row['ensembles']:.0f}",
                f"{100 * row['accuracy']:.2f}",
                f"{row['nll']:.4f}",
                f"{row['calibrated_nll']:.4f}",
            ]
            for name, rows in found.sizes.items()
            for row in rows
        ],
    )


def header(found: Found, environment: dict[str, Any]) -> str:
    """Return what is needed to repeat the study."""
    bench, data, recipe = found.bench, found.bench.data, found.bench.recipe
    names = ", ".join(architecture.name for architecture in bench.architectures)
    stacked = any(architecture.genotype for architecture in bench.architectures)
    cells = f"; cells in stacks of {recipe.num_cells}, C={recipe.channels}" if stacked else ""
    device = environment["cuda_device"] if bench.device.type == "cuda" else "no GPU used"
    return (
        f"# Loss landscape: {data.name}, {names}\n\n"
        f"{provenance(environment, hardware=device, packages=PACKAGES)} Recipe seed {recipe.seed}, from which "
        "initialisation, order and augmentation of every solution have seeds of their own; split seed 0.\n\n"
        f"**Scale that was run: {len(found.solutions)} solutions ({bench.seeds} seeds an architecture), {data.name}, "
        f"{len(data.train):,} training, {len(data.val):,} val and {len(data.test):,} test images of "
        f"{data.image_size} x {data.image_size}, {recipe.epochs} epochs.** SGD in batches of "
        f"{recipe.batch_size}, learning rate from {recipe.learning_rate:g} by a cosine, "
        f"{'with' if recipe.augment else 'without'} augmentation{cells}. "
        "This is **not** the scale of arXiv 1912.02757, which trains on CIFAR-10.\n\n"
    )


def report(found: Found, environment: dict[str, Any]) -> str:
    """Return all of OUTPUT.md."""
    first = found.bench.architectures[0].name
    answers = "".join(
        f"{contrast_table(rows, kind)}\n{answer(rows, kind)}\n" for kind, rows in found.comparisons.items()
    )
    barriers = "; ".join(f"{name} {line.barrier:.3f} nats" for name, line in found.landscape.lines.items())
    return (
        header(found, environment)
        + (f"## Seeds against {' and '.join(found.comparisons)}\n\n{answers}{shared_edges(found)}" if answers else "")
        + f"## Solutions\n\n{solutions_table(found)}\n## Weights and predictions: {first}\n\n{space_table(found)}\n"
        "The cosine is of all parameters; where BatchNorm's scales are among them, which all begin at 1, it is not 0 "
        f"for unrelated networks either. Loss barriers on val along straight lines: {barriers}.\n\n"
        "Published (arXiv 1912.02757, CIFAR-10, in words, for it shows figures without tables): checkpoints of one "
        "trajectory stay alike in weights and predictions, seeds are far apart in both and more diverse at their "
        "accuracy than what surrounds one solution, and a trajectory adds little to an ensemble.\n\n"
        f"## Ensemble size, on test\n\n{sizes_table(found)}\n"
        "Temperatures are fitted on val, for each ensemble. Each row is a mean over ensembles that share members; "
        f"the NLLs are in nats. {at_equal_size(found)}".rstrip()
        + "\n"
    )
