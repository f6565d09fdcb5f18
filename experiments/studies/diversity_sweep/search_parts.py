"""Parts c to e: schedules, samples against random deviations, and the ensemble while the search runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from studies.comparisons import compare_pairs
from studies.diversity_sweep.measured import CIFAR, Figures, beside, mean, num_edges
from studies.diversity_sweep.options import BASE_SETTING, COLD, CONSTANT, PAIRS, SETTINGS, STEERED
from studies.diversity_sweep.results import ALL, TOGETHER, WEIGHTS, mean_height
from studies.report import markdown_table


def schedules(figures: Figures) -> str:
    """Part c: schedules and warm-up epochs on and off."""
    rows = []
    for setting in SETTINGS:
        inherited, retrained = (("ensemble", setting, 1.0, weights) for weights in WEIGHTS)
        records = figures.results.searches(setting)
        rows.append(
            [
                setting if ", " in setting else f"{setting}, as it is",
                mean([record["spearman_shared"] for record in records], 2),
                mean([record["ensembles"][-1]["candidates"] for record in records], 1),
                figures.percent(inherited),
                figures.nats(inherited),
                figures.percent(retrained),
                figures.nats(retrained, "calibrated_nll"),
            ]
        )
    header = [
        "",
        "Spearman(λ, shared edges)",
        "genotypes",
        "inherited, test %",
        "NLL",
        "retrained, test %",
        "calibrated NLL",
    ]
    changes = {"": "62.4", f", {CONSTANT}": "57.7", f", {COLD}": ""}
    published = beside(
        {
            name: [
                value,
                *(figures.percent(("ensemble", f"{way}{change}", 1.0, "retrained")) for way in STEERED),
            ]
            for name, (change, value) in zip(
                ("with warm-up (EdgeNES, Table 3)", "without: constant schedules", "without warm-up epochs"),
                changes.items(),
                strict=True,
            )
        }
    )
    gained = ", ".join(
        f"{way} {figures.points(*(('ensemble', f'{way}{change}', 1.0, 'retrained') for change in list(changes)[:2]))}"
        for way in STEERED
    )
    return (
        "## c. Schedules and warm-up epochs, on and off\n\n"
        f"As it is, c and commitment rise, the temperature falls, and the first epochs train the weights alone; "
        f"*{CONSTANT}* keeps all three at their last value, *{COLD}* begins with the hypernetwork at once. "
        "EdgeNES calls the schedules of c and temperature warm-up. Ensembles as in b with the largest Λ.\n\n"
        f"{markdown_table(header, rows)}\n{published}\n"
        f"The schedules bring 4.7 points in the published table, here: {gained}.\n\n{figures.sentences('c')}"
    )


def against_deviations(figures: Figures) -> str:
    """Part d: samples of a search against random deviations that share as many edges with the base."""
    rows = []
    for way in STEERED:
        numbers: list[float | str] = sorted(
            {
                float(key[2])
                for key in figures.groups
                if key[0] == "samples" and key[1] == way and not isinstance(key[2], str)
            }
        )
        kinds: list[tuple[str, float | str]] = [("base", ALL)]
        kinds += [
            (kind, number)
            for number in [*reversed(numbers), ALL, TOGETHER]
            for kind in ("samples", "deviations")
        ]
        for kind, number in kinds:
            inherited, retrained = ((kind, way, number, weights) for weights in WEIGHTS)
            if inherited not in figures.groups:
                continue
            name = "random deviations" if kind == "deviations" else kind
            where = f" sharing {number:g}" if not isinstance(number, str) else f", {number}"
            group = figures.groups[inherited]
            rows.append(
                [
                    f"{way}: {name}{'' if kind == 'base' else where}",
                    f"{group.num_predictors} / {len(group.seeds)}",
                    figures.percent(inherited, "val_accuracy"),
                    figures.percent(inherited),
                    figures.percent(retrained, "val_accuracy"),
                    figures.percent(retrained),
                    figures.nats(retrained, "calibrated_nll"),
                ]
            )
    header = [
        "",
        "predictors / seeds",
        "inherited, val %",
        "inherited, test %",
        "retrained, val %",
        "retrained, test %",
        "calibrated NLL",
    ]
    published = beside(
        {
            name: [value, *(figures.percent((kind, way, TOGETHER, "retrained")) for way in STEERED)]
            for name, kind, value in (
                ("samples as an ensemble (EdgeNES)", "samples", "48.1 ± 1.7"),
                ("random deviations as an ensemble (RandomD-NES)", "deviations", "47.7 ± 3.4"),
            )
        },
        CIFAR,
    )
    gained = ", ".join(
        f"{way} {figures.points(('samples', way, TOGETHER, 'retrained'), ('deviations', way, TOGETHER, 'retrained'))}"
        for way in STEERED
    )
    return (
        "## d. Samples of the search against random deviations\n\n"
        f"Each sample stands beside a random deviation that shares as many edges with the base, of "
        f"{num_edges(figures, STEERED[0])}; the others are replaced, at *base* none. Numbers of edges at which a "
        "search holds no sample have no row. Inherited weights were trained for what the search drew, so that "
        "deviations start behind there.\n\n"
        f"{markdown_table(header, rows)}\n{published}\n"
        "As ensembles, samples are ahead of random deviations by 0.4 points in the published table, here by: "
        f"{gained}.\n\n{figures.sentences('d')}"
    )


def over_epochs(figures: Figures) -> str:
    """Part e: the ensemble against search epochs."""
    results, areas, rows = figures.results, {}, []
    epochs: Sequence[int] = []
    for setting in SETTINGS:
        epochs, losses = results.epoch_losses(setting)
        areas[setting] = mean_height(epochs, losses, axis=1)
        accuracies = [
            [100 * entry["val_accuracy"] for entry in record["epochs"]]
            for record in results.searches(setting)
        ]
        rows.append(
            [
                setting,
                *(
                    f"{statistics.fmean(values[index] for values in accuracies):.1f} / {of_epoch:.3f}"
                    for index, of_epoch in enumerate(losses.mean(axis=(0, 2)))
                ),
                mean([float(mean_height(epochs, np.array(values), axis=0)) for values in accuracies], 2),
                mean(areas[setting].mean(axis=1).tolist(), 4),
            ]
        )
    header = ["val % / NLL", *(f"epoch {epoch}" for epoch in epochs), "area, %", "area, NLL"]
    found = compare_pairs(areas, PAIRS)
    sentences = "".join(
        f"- {difference.sentence(f'*{first}*', f'*{second}*')}\n"
        for (first, second), difference in found.items()
    )
    published = beside(
        {
            "search of one network (DARTS)": [
                "1.2 h",
                mean(results.search_seconds(BASE_SETTING), 1) + " s",
                "",
            ],
            "search of the family (EdgeNES)": [
                "2.1 h",
                *(mean(results.search_seconds(way), 1) + " s" for way in STEERED),
            ],
        },
        "CIFAR-100 in GPU-hours, ours in CPU seconds",
    )
    return (
        "## e. The ensemble against search epochs\n\n"
        "Inherited weights, on val: each half is predicted by members that the other half chose. The area under the "
        "curve is divided by its length, so that it is a mean over epochs. Seconds hold the measurements, those of "
        "hypernet also the search of its base. No published figure of this curve is at hand; the nearest are the costs "
        "of the searches.\n\n"
        f"{markdown_table(header, rows)}\n{published}\n"
        "Area under the curve of val NLL, first minus second; intervals and p as above but over val images, corrected "
        f"for these {len(found)} comparisons:\n\n{sentences}"
    )
