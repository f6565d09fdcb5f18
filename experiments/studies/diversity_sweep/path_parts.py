"""Parts a and b: single networks along lambda, and ensembles of members up to a limit."""

from __future__ import annotations

import statistics

from studies.diversity_sweep.measured import CIFAR, Figures, beside, mean, num_edges
from studies.diversity_sweep.options import LIMITS, RETRAINED_LIMITS, STEERED
from studies.diversity_sweep.results import ALL, SHOWN_POINTS, WEIGHTS
from studies.report import markdown_table


def along_lambda(figures: Figures) -> str:
    """Part a: accuracy and shared edges along the paths."""
    rows = []
    for way in STEERED:
        records = figures.results.searches(way)
        largest = records[0]["config"]["hypernetwork"]["max_lambda"]
        edges = num_edges(figures, way)
        for share in SHOWN_POINTS:
            shared = [
                point["shared"]
                for record in records
                for point in record["points"]
                if abs(point["lam"] - share * largest) < 1e-5
            ]
            inherited, retrained = (("path", way, share, weights) for weights in WEIGHTS)
            rows.append(
                [
                    f"{way}, λ = {share * largest:g}",
                    f"{statistics.fmean(shared):.2f} of {edges}",
                    figures.percent(inherited, "val_accuracy"),
                    figures.percent(inherited),
                    figures.percent(retrained),
                    figures.nats(retrained),
                ]
            )
    header = [
        "",
        "edges shared with the base",
        "inherited, val %",
        "inherited, test %",
        "retrained, test %",
        "NLL",
    ]
    near, far = (0.0, 1.0), (1.0, 0.0)
    published = beside(
        {
            "one network, Fashion-MNIST one cell at λ = 0; ours at the base's end": [
                "92.10",
                *(
                    figures.percent(("path", way, end, "retrained"))
                    for way, end in zip(STEERED, near, strict=True)
                ),
            ],
            "the same at λ ≥ 5; ours at the other end": [
                "86.4 to 90.6",
                *(
                    figures.percent(("path", way, end, "retrained"))
                    for way, end in zip(STEERED, far, strict=True)
                ),
            ],
        }
    )
    lost = ", ".join(
        f"{way} {figures.points(('path', way, ends[1], 'retrained'), ('path', way, ends[0], 'retrained'))}"
        for way, *ends in zip(STEERED, near, far, strict=True)
    )
    course = ""
    for way in STEERED:
        first, last = (figures.percent(("path", way, share, "retrained")) for share in (0.0, 1.0))
        steered = mean([record["spearman_shared"] for record in figures.results.searches(way)], 2)
        course += (
            f"- {way}: the accuracy of one retrained network goes from {first} % at λ = 0 to {last} % at the largest "
            f"λ; Spearman(λ, shared edges) is {steered}.\n"
        )
    return (
        "## a. Accuracy and shared edges against λ\n\n"
        "Inherited: mean over directions. Retrained: the path of direction 0. For star the base is at λ = 0; for "
        "hypernet λ counts the edges shared with a given base, so that the farthest networks should be at λ = 0.\n\n"
        f"{markdown_table(header, rows)}\n{published}\n"
        f"From the base's end to the other the published accuracy changes by -5.7 to -1.5 points, ours by: {lost}.\n\n"
        f"{course}{figures.sentences('a')}"
    )


def up_to_limit(figures: Figures) -> str:
    """Part b: ensembles of members up to a limit."""
    rows = []
    for way in STEERED:
        records = figures.results.searches(way)
        for index, share in enumerate(LIMITS):
            entries = [record["ensembles"][index] for record in records]
            inherited, retrained = (("ensemble", way, share, weights) for weights in WEIGHTS)
            rows.append(
                [
                    f"{way}, Λ = {entries[0]['limit']:g}",
                    mean([entry["candidates"] for entry in entries], 1),
                    mean([len(entry["cells"]) for entry in entries], 1),
                    figures.percent(inherited),
                    figures.nats(inherited),
                    figures.percent(retrained),
                    figures.nats(retrained, "calibrated_nll"),
                ]
            )
    header = ["", "genotypes", "members", "inherited, test %", "NLL", "retrained, test %", "calibrated NLL"]
    published = beside(
        {
            "one network of the base's cells (published: DARTS)": [
                "46.8 ± 1.7",
                *(figures.percent(("base", way, ALL, "retrained")) for way in STEERED),
            ],
            "DartsEns (three times the cost of a search), not run here": ["48.2 ± 1.5", "", ""],
            "ensemble of one search (EdgeNES), largest Λ": [
                "48.1 ± 1.7",
                *(figures.percent(("ensemble", way, 1.0, "retrained")) for way in STEERED),
            ],
        },
        CIFAR,
    )
    gained = ", ".join(
        f"{way} {figures.points(('ensemble', way, 1.0, 'retrained'), ('base', way, ALL, 'retrained'))}"
        for way in STEERED
    )
    sizes = ""
    for way in STEERED:
        half, whole = (figures.percent(("ensemble", way, share, "retrained")) for share in RETRAINED_LIMITS)
        held = [record["ensembles"][-1]["candidates"] for record in figures.results.searches(way)]
        sizes += (
            f"- {way}: the paths hold {mean(held, 1)} different genotypes; the retrained ensemble reaches {whole} % "
            f"with the largest Λ and {half} % with half of it.\n"
        )
    return (
        "## b. Ensembles against the limit Λ\n\n"
        "Members are drawn from all different genotypes with λ ≤ Λ and chosen greedily on val with inherited weights; "
        "fewer than asked for where the paths do not hold as many.\n\n"
        f"{markdown_table(header, rows)}\n{published}\n"
        "Over one network of the base's cells the ensemble gains 1.3 points in the published table, here: "
        f"{gained}.\n\n{sizes}{figures.sentences('b')}"
    )
