"""The tables and sentences of the five parts, from groups of predictors of finished seeds.

Legend: S seeds, N images, K classes, E evaluated epochs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.report import compare_pairs, how_to_read, markdown_table, provenance
from dnas_ens.metrics.calibration import per_image_calibrated_nll
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.metrics.significance import mean_and_deviation
from studies.diversity_sweep.searches import (
    BASE_SETTING,
    COLD,
    CONSTANT,
    LIMITS,
    PAIRS,
    RETRAINED_LIMITS,
    RETRAINED_POINTS,
    SETTINGS,
    STEERED,
    Study,
    path_cells,
)
from studies.search_studies import load

#: A network's or an ensemble's probabilities on val and test, (N, K) each.
Probs = tuple[np.ndarray, np.ndarray]
#: What a group is: its part in the study, setting, where, and "inherited" or "retrained" weights.
Key = tuple[str, str, float | str, str]
WEIGHTS = ("inherited", "retrained")
#: Shares of the largest lambda in the table of paths.
SHOWN_POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
ALL, TOGETHER = "all", "as an ensemble"

#: Where the published tables of ensembles are from.
CIFAR = "accuracy %; published: CIFAR-100, one cell searched, two stacked"
#: Comparisons on test by the part they belong to; those of missing groups are left out.
COMPARED: dict[str, list[tuple[Key, Key]]] = {
    "a": [(("path", way, 1.0, "retrained"), ("path", way, 0.0, "retrained")) for way in STEERED],
    "b": [(("ensemble", way, 0.5, "retrained"), ("ensemble", way, 1.0, "retrained")) for way in STEERED],
    "c": [(("ensemble", first, 1.0, "retrained"), ("ensemble", second, 1.0, "retrained")) for first, second in PAIRS],
    "d": [
        (("samples", way, number, weights), ("deviations", way, number, weights))
        for way in STEERED
        for weights, number in (("inherited", ALL), ("retrained", ALL), ("retrained", TOGETHER))
    ],
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Predictors that play one part: figures a seed, each the mean over the seed's predictors.

    Args:
        seeds: Those that have such predictors.
        figures: val_accuracy, test_accuracy, test_nll and calibrated_nll, S values each.
        losses: Calibrated NLL on each test image, mean over the predictors, (S, N) in nats.
        num_predictors: Over all seeds.
    """

    seeds: list[int]
    figures: dict[str, list[float]]
    losses: np.ndarray
    num_predictors: int


class Figures:
    """Everything the parts are written from: groups of predictors of finished seeds, and their comparisons on test.

    Args:
        study: Its options.
        records: Finished units.
        seeds: Those of which everything was run.
    """

    def __init__(self, study: Study, records: Records, seeds: Sequence[int]) -> None:
        self.study, self.records, self.seeds = study, records, list(seeds)
        self.data = load(study.configuration(STEERED[0], 0).data)
        self.val_labels, self.test_labels = (split.labels.numpy() for split in (self.data.val, self.data.test))
        self._arrays: dict[tuple[str, str, int], dict[str, np.ndarray]] = {}
        measured = {key: self._group(key) for key in self._keys()}
        self.groups = {key: group for key, group in measured.items() if group.seeds}
        pairs = [pair for pairs in COMPARED.values() for pair in pairs if {*pair} <= {*self.groups}]
        self.compared = compare_pairs({key: group.losses for key, group in self.groups.items()}, pairs)

    def searches(self, setting: str) -> list[Record]:
        """Return the records of a setting's searches, seed by seed."""
        return [self.records["search", setting, seed] for seed in self.seeds]

    def arrays(self, kind: str, name: str, seed: int) -> dict[str, np.ndarray]:
        """Return the predictions of a unit, read once."""
        key = kind, name, seed
        if key not in self._arrays:
            self._arrays[key] = self.records.arrays(key)
        return self._arrays[key]

    def _keys(self) -> Iterator[Key]:
        """Yield every group that tables and comparisons need."""
        for setting in SETTINGS:
            for weights in WEIGHTS:
                inherited = weights == "inherited"
                if setting not in STEERED:
                    yield "ensemble", setting, 1.0, weights
                    continue
                for share in LIMITS if inherited else RETRAINED_LIMITS:
                    yield "ensemble", setting, share, weights
                for share in SHOWN_POINTS if inherited else RETRAINED_POINTS:
                    yield "path", setting, share, weights
                yield "base", setting, ALL, weights
                shared = {int(sample["shared"]) for record in self.searches(setting) for sample in record["samples"]}
                numbers: list[float | str] = [*sorted(shared), ALL, TOGETHER]
                for number in numbers:
                    for kind in ("samples", "deviations"):
                        yield kind, setting, number, weights

    def _predictors(self, key: Key, seed: int) -> list[Probs]:
        """Return what the predictors of a group predict, in a seed; paths with inherited weights on every direction."""
        part, setting, place, weights = key
        record, inherited = self.records["search", setting, seed], weights == "inherited"
        if part == "ensemble":
            (names,) = [each["cells"] for each in record["ensembles"] if each["share"] == place]
        elif part == "path":
            directions = record["config"]["hypernetwork"]["directions"] if inherited else 1
            names = [path_cells(record, float(place), direction) for direction in range(directions)]
        elif part == "base":
            names = ["base" if inherited else record["base"]["cells"]]
        else:
            names = [
                f"deviation {index}" if part == "deviations" and inherited else str(entry["cells"])
                for index, entry in enumerate(record[part])
                if isinstance(place, str) or entry["shared"] == place
            ]
        if inherited:
            arrays = self.arrays("search", setting, seed)
            positions = [arrays["names"].tolist().index(name) for name in names]
            probs = [(arrays["val_probs"][index], arrays["test_probs"][index]) for index in positions]
        else:
            found = [self.arrays("training", name, seed) for name in names]
            probs = [(arrays["val_probs"], arrays["test_probs"]) for arrays in found]
        if probs and (part == "ensemble" or place == TOGETHER):
            val, test = (np.mean(of_split, axis=0) for of_split in zip(*probs, strict=True))
            return [(val, test)]
        return probs

    def _group(self, key: Key) -> Group:
        """Measure predictors; seeds without any are left out."""
        by_seed = {seed: self._predictors(key, seed) for seed in self.seeds}
        by_seed = {seed: predictors for seed, predictors in by_seed.items() if predictors}
        figures: dict[str, list[float]] = {
            name: [] for name in ("val_accuracy", "test_accuracy", "test_nll", "calibrated_nll")
        }
        losses = []
        for predictors in by_seed.values():
            of_images = np.stack(
                [per_image_calibrated_nll(val, self.val_labels, test, self.test_labels) for val, test in predictors]
            )
            losses.append(of_images.mean(axis=0))
            for name, values in (
                ("val_accuracy", [accuracy(val, self.val_labels) for val, _ in predictors]),
                ("test_accuracy", [accuracy(test, self.test_labels) for _, test in predictors]),
                ("test_nll", [nll(test, self.test_labels) for _, test in predictors]),
                ("calibrated_nll", of_images.mean(axis=1).tolist()),
            ):
                figures[name].append(statistics.fmean(values))
        return Group(
            seeds=list(by_seed),
            figures=figures,
            losses=np.stack(losses) if losses else np.empty((0, len(self.test_labels))),
            num_predictors=sum(map(len, by_seed.values())),
        )

    def epoch_losses(self, setting: str) -> tuple[list[int], np.ndarray]:
        """Return the evaluated epochs and the ensemble's NLL on every val image, (S, E, N)."""
        epochs = [int(entry["epoch"]) for entry in self.searches(setting)[0]["epochs"]]
        losses = [self.arrays("search", setting, seed)["epoch_losses"] for seed in self.seeds]
        return epochs, np.stack(losses)

    def sample_numbers(self, way: str, weights: str) -> list[float]:
        """Return the numbers of shared edges at which there are samples, ascending."""
        return sorted(
            float(place)
            for part, setting, place, of in self.groups
            if (part, setting, of) == ("samples", way, weights) and not isinstance(place, str)
        )

    def num_edges(self, way: str) -> int:
        """Return how many edges the base of a way of steering has."""
        base = self.searches(way)[0]["base"]["genotype"]
        return sum(len(node) for cell in base.values() for node in cell)

    # As text

    def percent(self, key: Key, figure: str = "test_accuracy") -> str:
        """Return an accuracy in %, mean ± standard deviation over seeds; empty for a missing group."""
        return mean([100.0 * each for each in self.groups[key].figures[figure]], 2) if key in self.groups else ""

    def nats(self, key: Key, figure: str = "test_nll") -> str:
        """Return an NLL, mean ± standard deviation over seeds; empty for a missing group."""
        return mean(self.groups[key].figures[figure], 4) if key in self.groups else ""

    def ensemble_cells(self, setting: str, share: float) -> list[str]:
        """Return accuracy and NLL of an ensemble with inherited weights, and retrained."""
        inherited, trained = (("ensemble", setting, share, weights) for weights in WEIGHTS)
        nlls = self.nats(inherited), self.nats(trained, "calibrated_nll")
        return [self.percent(inherited), nlls[0], self.percent(trained), nlls[1]]

    def beside(self, group: Callable[[str], Key], published: str) -> list[str]:
        """Return a published accuracy and that of a group of each way of steering."""
        return [published, *(self.percent(group(way)) for way in STEERED)]

    def apart(self, first: Callable[[str], Key], second: Callable[[str], Key]) -> str:
        """Say first minus second in points of accuracy, the seeds' mean, for each way; a dash for missing groups."""
        told = []
        for way in STEERED:
            points, pair = "–", (first(way), second(way))
            if {*pair} <= {*self.groups}:
                ours, theirs = (statistics.fmean(self.groups[key].figures["test_accuracy"]) for key in pair)
                points = f"{100 * (ours - theirs):+.2f}"
            told.append(f"{way} {points}")
        return ", ".join(told)

    def sentences(self, part: str) -> str:
        """Say how the compared pairs of a part differ."""
        return "".join(
            f"- {difference.sentence(called(first), called(second))}\n"
            for (first, second), difference in self.compared.items()
            if (first, second) in COMPARED[part]
        )


def retrained(part: str, place: float | str, change: str = "") -> Callable[[str], Key]:
    """Return what gives the key of a retrained group for a way of steering."""
    return lambda way: (part, f"{way}{change}", place, "retrained")


def called(key: Key) -> str:
    """Return what a sentence calls a group."""
    part, setting, place, weights = key
    if part == "path":
        return f"*{setting}, one network at λ = {place:g} of the range, {weights}*"
    if part == "ensemble":
        return f"*{setting}, ensemble with Λ = {place:g} of the range, {weights}*"
    of_all = f" {TOGETHER}" if place == TOGETHER else ""
    return f"*{setting}: {'samples' if part == 'samples' else 'random deviations'}{of_all}, {weights}*"


def beside(rows: Mapping[str, Sequence[str]], of: str = "accuracy %") -> str:
    """Return a table of published figures beside ours; a row is the published one, then one a way of steering."""
    header = [of, "published", *(f"ours, {way}" for way in STEERED)]
    return markdown_table(header, ([name, *values] for name, values in rows.items()))


def mean(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard deviation over seeds as text."""
    return mean_and_deviation(values, digits=digits)


def mean_height(epochs: Sequence[float], values: np.ndarray, *, axis: int) -> np.ndarray:
    """Return the area under a curve by the trapezoidal rule, divided by the length of its base.

    Args:
        epochs: E positions, ascending; of a single one its value is returned.
        values: The curve along `axis`.
        axis: Of length E.

    Returns:
        In the unit of the values, without that axis.
    """
    if len(epochs) == 1:
        first: np.ndarray = np.take(values, 0, axis=axis)
        return first
    area: np.ndarray = np.trapezoid(values, np.asarray(epochs, dtype=float), axis=axis)
    height: np.ndarray = area / (epochs[-1] - epochs[0])
    return height


def along_lambda(figures: Figures) -> str:
    """Part a: accuracy and shared edges along the paths."""
    rows = []
    for way in STEERED:
        records = figures.searches(way)
        largest = records[0]["config"]["hypernetwork"]["max_lambda"]
        edges = figures.num_edges(way)
        for share in SHOWN_POINTS:
            shared = [
                point["shared"]
                for record in records
                for point in record["points"]
                if abs(point["lam"] - share * largest) < 1e-5
            ]
            inherited, trained = (("path", way, share, weights) for weights in WEIGHTS)
            rows.append(
                [
                    f"{way}, λ = {share * largest:g}",
                    f"{statistics.fmean(shared):.2f} of {edges}",
                    figures.percent(inherited, "val_accuracy"),
                    figures.percent(inherited),
                    figures.percent(trained),
                    figures.nats(trained),
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

    def near(way: str) -> Key:
        return "path", way, 0.0 if way == "star" else 1.0, "retrained"

    def far(way: str) -> Key:
        return "path", way, 1.0 if way == "star" else 0.0, "retrained"

    published = beside(
        {
            "one network, Fashion-MNIST one cell at λ = 0; ours at the base's end": figures.beside(near, "92.10"),
            "the same at λ ≥ 5; ours at the other end": figures.beside(far, "86.4 to 90.6"),
        }
    )
    lost = figures.apart(far, near)
    course = ""
    for way in STEERED:
        first, last = (figures.percent(("path", way, share, "retrained")) for share in (0.0, 1.0))
        steered = mean([record["spearman_shared"] for record in figures.searches(way)], 2)
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
        records = figures.searches(way)
        for index, share in enumerate(LIMITS):
            entries = [record["ensembles"][index] for record in records]
            rows.append(
                [
                    f"{way}, Λ = {entries[0]['limit']:g}",
                    mean([entry["candidates"] for entry in entries], 1),
                    mean([len(entry["cells"]) for entry in entries], 1),
                    *figures.ensemble_cells(way, share),
                ]
            )
    header = ["", "genotypes", "members", "inherited, test %", "NLL", "retrained, test %", "calibrated NLL"]
    base, largest = retrained("base", ALL), retrained("ensemble", 1.0)
    published = beside(
        {
            "one network of the base's cells (published: DARTS)": figures.beside(base, "46.8 ± 1.7"),
            "DartsEns (three times the cost of a search), not run here": ["48.2 ± 1.5", "", ""],
            "ensemble of one search (EdgeNES), largest Λ": figures.beside(largest, "48.1 ± 1.7"),
        },
        CIFAR,
    )
    gained = figures.apart(largest, base)
    sizes = ""
    for way in STEERED:
        half, whole = (figures.percent(("ensemble", way, share, "retrained")) for share in RETRAINED_LIMITS)
        held = [record["ensembles"][-1]["candidates"] for record in figures.searches(way)]
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


def schedules(figures: Figures) -> str:
    """Part c: schedules and warm-up epochs on and off."""
    rows = []
    for setting in SETTINGS:
        records = figures.searches(setting)
        rows.append(
            [
                setting if ", " in setting else f"{setting}, as it is",
                mean([record["spearman_shared"] for record in records], 2),
                mean([record["ensembles"][-1]["candidates"] for record in records], 1),
                *figures.ensemble_cells(setting, 1.0),
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
    plain, constant, cold = (retrained("ensemble", 1.0, change) for change in ("", f", {CONSTANT}", f", {COLD}"))
    published = beside(
        {
            "with warm-up (EdgeNES, Table 3)": figures.beside(plain, "62.4"),
            "without: constant schedules": figures.beside(constant, "57.7"),
            "without warm-up epochs": figures.beside(cold, ""),
        }
    )
    gained = figures.apart(plain, constant)
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
        numbers: list[float | str] = [*reversed(figures.sample_numbers(way, "inherited")), ALL, TOGETHER]
        kinds: list[tuple[str, float | str]] = [("base", ALL)]
        kinds += [(kind, number) for number in numbers for kind in ("samples", "deviations")]
        for kind, number in kinds:
            inherited, trained = ((kind, way, number, weights) for weights in WEIGHTS)
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
                    figures.percent(trained, "val_accuracy"),
                    figures.percent(trained),
                    figures.nats(trained, "calibrated_nll"),
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
    samples, deviations = retrained("samples", TOGETHER), retrained("deviations", TOGETHER)
    published = beside(
        {
            "samples as an ensemble (EdgeNES)": figures.beside(samples, "48.1 ± 1.7"),
            "random deviations as an ensemble (RandomD-NES)": figures.beside(deviations, "47.7 ± 3.4"),
        },
        CIFAR,
    )
    gained = figures.apart(samples, deviations)
    return (
        "## d. Samples of the search against random deviations\n\n"
        f"Each sample stands beside a random deviation that shares as many edges with the base, of "
        f"{figures.num_edges(STEERED[0])}; the others are replaced, at *base* none. Numbers of edges at which a "
        "search holds no sample have no row. Inherited weights were trained for what the search drew, so that "
        "deviations start behind there.\n\n"
        f"{markdown_table(header, rows)}\n{published}\n"
        "As ensembles, samples are ahead of random deviations by 0.4 points in the published table, here by: "
        f"{gained}.\n\n{figures.sentences('d')}"
    )


def over_epochs(figures: Figures) -> str:
    """Part e: the ensemble against search epochs."""
    areas, rows = {}, []
    epochs: Sequence[int] = []
    for setting in SETTINGS:
        epochs, losses = figures.epoch_losses(setting)
        areas[setting] = mean_height(epochs, losses, axis=1)
        accuracies = [
            [100 * entry["val_accuracy"] for entry in record["epochs"]] for record in figures.searches(setting)
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
        f"- {difference.sentence(f'*{first}*', f'*{second}*')}\n" for (first, second), difference in found.items()
    )

    def seconds(setting: str) -> str:
        """CPU seconds of each search with its measurements, for hypernet with the search of its base."""
        stages = (BASE_SETTING, setting) if setting.startswith("hypernet") else (setting,)
        costs = zip(*map(figures.searches, stages), strict=True)
        return mean([sum(float(record["cpu_seconds"]) for record in of_seed) for of_seed in costs], 1) + " s"

    published = beside(
        {
            "search of one network (DARTS)": ["1.2 h", seconds(BASE_SETTING), ""],
            "search of the family (EdgeNES)": ["2.1 h", *map(seconds, STEERED)],
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


def report(figures: Figures, env: Mapping[str, Any]) -> tuple[str, str]:
    """Return what OUTPUT.md begins with, and the tables of a finished study."""
    study, seeds, data = figures.study, figures.seeds, figures.data
    config, recipe = study.configuration(STEERED[0], seeds[0]), study.recipe(seeds[0])
    cells, edges = (
        f"{number} {noun}{'s' if number > 1 else ''}"
        for number, noun in ((study.cells, "cell"), (study.edges_per_node, "edge"))
    )
    largest = [study.configuration(way, seeds[0]).hypernetwork.max_lambda for way in STEERED]
    header = (
        f"# The studies of EdgeNES ({study.data}, preset {config.preset}, {cells})\n\n"
        f"{provenance(env, hardware='no GPU, one thread a search')} Seeds "
        f"{', '.join(map(str, seeds))}.\n\n"
        f"**Scale that was run: {study.data}, {len(data.train)} training, {len(data.val)} val and {len(data.test)} "
        f"test images; searches of {cells}, C = {config.supernet.num_channels}, {edges} a node, "
        f"{config.bilevel.epochs} epochs; {recipe.epochs} epochs from scratch with C = {recipe.channels}; ensembles of "
        f"{study.members}.** The published figures are of other data, networks and recipes, so that only orders and "
        "directions compare; they stand here because the question is the same. "
        f"*star*: js-pairwise, R = {config.hypernetwork.directions}, learnt base, lambda a distance up to "
        f"{largest[0]:g}. *hypernet*: edge-overlap, R = 1, base from the search *optimal* of the same seed, lambda a "
        f"number of shared edges up to {largest[1]:g}. {study.lambdas} values of lambda a direction. *Inherited*: the "
        "supernet's weights, BatchNorm statistics measured anew for each network; *retrained*: from scratch, once. "
        "Mean ± standard deviation over seeds. Everything is chosen on val; test is only predicted.\n\n"
        f"![Accuracy, shared edges, ensembles, deviations and search curves]({study.path.name}.png)\n\n"
        f"Sentences on a to d: {how_to_read(len(figures.compared))} Calibrated NLL of single networks is averaged "
        "over those of a seed.\n\n"
    )
    parts = (along_lambda, up_to_limit, schedules, against_deviations, over_epochs, cost)
    return header, "\n".join(part(figures) for part in parts)


def cost(figures: Figures) -> str:
    """Say what searches and trainings took."""
    units = [unit for unit in figures.records if unit["seed"] in figures.seeds]
    trainings = [unit["cpu_seconds"] for unit in units if unit["kind"] == "training"]
    searches = [unit["cpu_seconds"] for unit in units if unit["kind"] == "search"]
    return (
        f"## Cost\n\n{len(searches)} searches of {mean(searches, 1)} and {len(trainings)} "
        f"trainings of {mean(trainings, 1)} CPU seconds, "
        f"{(sum(searches) + sum(trainings)) / 60:.1f} CPU minutes in all. Other work ran on the same machine.\n"
    )
