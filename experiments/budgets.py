"""What is worth most at equal seconds? Ours by budget beside what people would take, each at its best split.

    python experiments/budgets.py --workers 2

For every regime and seed each method may spend up to three budgets of CPU seconds, search and discarded networks
included, on one thread. Ours is `python -m dnas_ens --budget`: one run for each budget, its seconds the whole command's
but for the evaluation. Every other method trains networks of several lengths and widths, and takes at each budget the
split (length, width, number of networks, cycles, which ends join), the same with all seeds, that is best on val: in
hindsight, which ours does not have. Val alone chooses; losses on test are computed for every split and read for the
chosen ones.

Written down before it was run (docs/log.md): the rows, the budgets, and what would count as shown.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
import textwrap
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dnas_ens.budget.amount import Amount
from dnas_ens.budget.cells import StarCells
from dnas_ens.budget.choice import best_set, cross_fitted_loss
from dnas_ens.budget.run import FOUND, Spending
from dnas_ens.commands.parse import parse
from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.report import markdown_table, provenance
from dnas_ens.compare.study import RESULTS, Task, require_positive, run_missing, run_script, write_study
from dnas_ens.compare.tables import sentences, stacked
from dnas_ens.config import RetrainConfig, require
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.config.settings import Engine
from dnas_ens.data import ImageData, load_data
from dnas_ens.figures.style import CYCLE, LINE_COLOUR, MARKERS, font, new_figure, style_axis
from dnas_ens.metrics.calibration import per_image_calibrated_nll
from dnas_ens.metrics.significance import mean_and_deviation
from dnas_ens.nn.network import Network
from dnas_ens.run.files import with_ending, write_json
from dnas_ens.run.machine import environment
from dnas_ens.search.run import run_search
from dnas_ens.space.genotype import Genotype, random_genotype
from dnas_ens.space.known_cells import PLAIN_CNN, RESNET
from dnas_ens.space.spaces import SPACES
from dnas_ens.training.prediction import predict_log_probs
from dnas_ens.training.trainer import MemberTraining, Parent
from dnas_ens.training.workers import worker_pool

PROG = "python experiments/budgets.py"
OURS = "ours by budget"


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Images and what may be spent on them.

    Args:
        budgets: CPU seconds, rising.
        trainings: Epochs, channels and most networks from fresh weights of every training that the other methods try.
            Each goes on by cycles of a fifth of its epochs, as far as the largest budget reaches.
        cycle_rate: Where these cycles begin, as a share of the learning rate; what suits the images in hindsight.
        own_test: Whether the data come with test images; else those of one split serve with all seeds, because losses
            are compared image by image.
    """

    data: str
    budgets: tuple[float, ...]
    trainings: tuple[tuple[int, int, int], ...]
    limit_train: int | None = None
    image_size: int | None = None
    augment: bool = True
    cycle_rate: float = 1.0
    own_test: bool = True

    def load(self, seed: int) -> ImageData:
        """Return the images; the seed draws the subset, and the splits where the data come with test images."""
        if not self.own_test and self.limit_train is not None:
            return load_data(self.data, image_size=self.image_size).limited(self.limit_train, seed=seed)
        return load_data(self.data, limit_train=self.limit_train, image_size=self.image_size, seed=seed)


FASHION_MNIST = Regime(
    data="fashion-mnist",
    limit_train=2000,
    image_size=14,
    cycle_rate=0.25,
    budgets=(15, 40, 100),
    trainings=((30, 16, 2), (60, 16, 2), (90, 16, 2), (120, 16, 2), (160, 16, 1), (30, 32, 1), (80, 32, 1)),
)
PHOTOGRAPHS = Regime(
    data="cifar10-jpeg",
    limit_train=2000,
    image_size=16,
    budgets=(15, 40, 100),
    trainings=((30, 16, 2), (60, 16, 2), (90, 16, 2), (120, 16, 2), (160, 16, 1), (30, 32, 1), (80, 32, 1)),
)
SHORT = ((20, 16, 2), (25, 16, 1), (30, 16, 1), (35, 16, 1), (15, 32, 1))
LONG = ((60, 16, 2), (120, 16, 2), (60, 32, 1))
REGIMES = {
    # All of digits leave no error to tell methods by.
    "digits-200": Regime(
        data="digits",
        limit_train=200,
        own_test=False,
        budgets=(15, 40),
        trainings=((60, 16, 3), (120, 16, 5), (250, 16, 5), (500, 16, 2), (250, 32, 2)),
    ),
    "fashion-mnist-14px-2k": FASHION_MNIST,
    # The smallest alone.
    "fashion-mnist-14px-2k-15s": replace(FASHION_MNIST, budgets=(15,), trainings=SHORT),
    "cifar10-jpeg-16px-2k-15s": replace(PHOTOGRAPHS, budgets=(15,), trainings=SHORT),
    # All that the two smaller budgets pay for, which takes half the time.
    "fashion-mnist-14px-2k-40s": replace(FASHION_MNIST, budgets=(15, 40)),
    # The largest alone, with the trainings that may be worth most for it.
    "fashion-mnist-14px-2k-100s": replace(FASHION_MNIST, budgets=(100,), trainings=LONG),
    "fashion-mnist-14px-2k-plain": Regime(
        data="fashion-mnist",
        limit_train=2000,
        image_size=14,
        augment=False,
        budgets=(15, 40),
        trainings=((8, 16, 20), (12, 16, 12), (24, 16, 5), (8, 32, 10), (12, 32, 6)),
    ),
    "cifar10-jpeg-16px-2k": PHOTOGRAPHS,
    "cifar10-jpeg-16px-2k-40s": replace(PHOTOGRAPHS, budgets=(15, 40)),
    "cifar10-jpeg-16px-2k-100s": replace(PHOTOGRAPHS, budgets=(100,), trainings=LONG),
    "fashion-mnist-28px-10k": Regime(
        data="fashion-mnist",
        limit_train=10_000,
        cycle_rate=0.25,
        budgets=(40, 120),
        trainings=((15, 16, 2), (25, 16, 3), (50, 16, 1), (25, 32, 1)),
    ),
}
#: Cycles that a network goes on by at most.
MOST_CYCLES = 6
#: What is trained may cost so many times the largest budget: a split is paid for if its mean over seeds is, and seeds
#: differ.
DEARER = 1.2


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network: CPU seconds of its training, and its probabilities on val and test."""

    seconds: float
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Split:
    """A way to spend: its seconds, in words, and the networks in it."""

    seconds: float
    spent: str
    networks: Sequence[Trained]

    def val(self) -> np.ndarray:
        """Return the probabilities on val, (M, N, K)."""
        return np.stack([network.val for network in self.networks])


class Bench:
    """Trains networks of one regime and seed, and measures what they cost."""

    def __init__(self, regime: Regime, seed: int) -> None:
        self.regime, self.seed = regime, seed
        self.data = regime.load(seed)
        self.recipe = RetrainConfig(augment=regime.augment, seed=1000 + seed)
        self.labels = self.data.val.labels.numpy()
        self._number = 0

    def trained(self, genotype: Genotype, epochs: int, channels: int) -> Iterator[Trained]:
        """Train a network, and yield it and the end of every cycle that goes on from the one before, without end."""
        state: dict[str, torch.Tensor] = {}
        for cycle in itertools.count():
            length = max(1, epochs // 5) if cycle else epochs
            rate = self.recipe.learning_rate * (self.regime.cycle_rate if cycle else 1)
            recipe = replace(self.recipe, epochs=length, channels=channels, learning_rate=rate)
            parent = Parent(self._number - 1, functools.partial(dict, state)) if cycle else None
            training = MemberTraining(genotype, self.data, recipe, index=self._number, parent=parent)
            self._number += 1
            start = time.process_time()
            training.begin()
            while training.epoch < recipe.epochs:
                training.run_epoch()
            training.end()
            seconds = time.process_time() - start
            state = {name: tensor.clone() for name, tensor in training.network.state_dict().items()}
            yield self.predicted(training.network, seconds)

    def predicted(self, network: Network, seconds: float) -> Trained:
        """Predict val and test."""
        from dnas_ens.data.batches import Augmentation

        augmentation = Augmentation.for_data(self.data, augment=False)
        val, test = (
            predict_log_probs(network.eval(), split, augmentation=augmentation).exp().numpy()
            for split in (self.data.val, self.data.test)
        )
        return Trained(seconds=seconds, val=val, test=test)


def splits(
    bench: Bench,
    genotypes: Iterator[Genotype],
    *,
    fixed: float = 0.0,
    choose: bool = False,
    seconds_per_epoch: float = 0.0,
    trainings: Sequence[tuple[int, int, int]] | None = None,
) -> list[Split]:
    """Return every split of a grid that the largest budget pays for.

    One is a length, a width, K networks from fresh weights with H cycles each, and how many ends of each are taken.

    Args:
        genotypes: One for every network from fresh weights.
        fixed: Seconds spent before.
        choose: Whether the best set on val is a split too.
        seconds_per_epoch: What an epoch is known to take, so that nothing is trained that costs too much.
        trainings: Instead of the regime's.
    """
    found: list[Split] = []
    most = DEARER * bench.regime.budgets[-1] - fixed
    for epochs, channels, copies in trainings or bench.regime.trainings:
        chains: list[list[Trained]] = []
        while len(chains) < copies and (len(chains) + 1) * epochs * seconds_per_epoch <= most:
            training = bench.trained(next(genotypes), epochs, channels)
            chains.append([next(training)])
            seconds_per_epoch = _seconds(chains, 0) / (len(chains) * epochs)
            # Further cycles of a network are of use only where those before it have as many, and all are paid for.
            while len(chains[-1]) <= MOST_CYCLES and all(len(chain) > len(chains[-1]) for chain in chains[:-1]):
                if _seconds(chains, len(chains[-1])) > most:
                    break
                chains[-1].append(next(training))
        for count in range(1, len(chains) + 1):
            for cycles in range(min(len(chain) for chain in chains[:count])):
                ends = [chain[: cycles + 1] for chain in chains[:count]]
                seconds = fixed + _seconds(ends, cycles)
                spent = f"{count} × {epochs}" + (f" + {cycles} × {max(1, epochs // 5)}" if cycles else "")
                spent += f", C={channels}" if channels != bench.recipe.channels else ""
                for last in sorted({1, 2, 3, cycles + 1}):
                    if last > cycles + 1:
                        continue
                    networks = [end for chain in ends for end in chain[-last:]]
                    taken = spent if last == cycles + 1 else f"last {last} of {spent}"
                    found.append(Split(seconds=seconds, spent=taken, networks=networks))
                if choose and count > 1 and not cycles:
                    networks = [end for chain in ends for end in chain]
                    found.append(Split(seconds=seconds, spent=f"best of {spent}", networks=networks))
    return found


def _seconds(chains: Sequence[Sequence[Trained]], cycles: int) -> float:
    """Return what networks with so many cycles each took; a cycle that was not trained counts as those that were."""
    total = 0.0
    for chain in chains:
        ends = chain[: cycles + 1]
        a_cycle = ends[-1].seconds if len(ends) > 1 else chain[0].seconds / 5
        total += sum(end.seconds for end in ends) + (cycles + 1 - len(ends)) * a_cycle
    return total


def plain_cnn(bench: Bench) -> list[Split]:
    """The plain CNN that one would write without a search."""
    return splits(bench, itertools.repeat(PLAIN_CNN))


def resnet(bench: Bench) -> list[Split]:
    """A ResNet of the same size."""
    return splits(bench, itertools.repeat(RESNET))


def random_cells(bench: Bench, *, space: str = "efficient") -> list[Split]:
    """Random cells of the space, all of them (Random-NES) or the best on val (NES-RS, arXiv 2006.08573).

    Those of DARTS take six times as long a step, so they are trained for a quarter of the epochs, and eight channels
    wide.
    """
    generator = np.random.default_rng(bench.seed)
    rules = SPACES[space]

    def drawn() -> Iterator[Genotype]:
        while True:
            yield random_genotype(
                generator, operations=rules.operations, num_nodes=rules.num_nodes, edges_per_node=2, space=space
            )

    trainings = bench.regime.trainings
    if space == "darts":
        trainings = tuple((epochs // 4, channels // 2, min(copies, 2)) for epochs, channels, copies in trainings)
    return splits(bench, drawn(), choose=True, trainings=trainings)


def found_by_star(seed: int, data: ImageData) -> Sequence[Genotype]:
    """Return the cells that the star alone finds, its paths leaving a residual block; ours begins with them too."""
    cells = StarCells(with_fields(search_preset("smoke"), seed=seed), data)
    return cells.find()[len(cells.known) :]


def star_cells(bench: Bench) -> list[Split]:
    """Cells by the star alone; no likelihood has been looked at."""
    start = time.process_time()
    genotypes = found_by_star(bench.seed, bench.data)
    fixed = time.process_time() - start
    return splits(bench, itertools.cycle(genotypes), fixed=fixed, choose=True)


def best_found_cell(bench: Bench) -> list[Split]:
    """A deep ensemble of the best single cell found: its base, or the best of its cells, each trained to find it."""
    start = time.process_time()
    result = run_search(with_fields(search_preset("smoke"), seed=bench.seed), bench.data)
    genotypes = result.ranked()
    fixed = time.process_time() - start
    found = splits(bench, itertools.repeat(result.base), fixed=fixed)
    epochs, channels, _ = bench.regime.trainings[0]
    if not found or fixed + (len(genotypes) + 1) * (found[0].seconds - fixed) > DEARER * bench.regime.budgets[-1]:
        # To find the best of them would leave nothing to train it with.
        return found
    pool = [next(bench.trained(genotype, epochs, channels)) for genotype in genotypes]
    best = int(np.argmin([cross_fitted_loss(network.val[None], bench.labels) for network in pool]))
    fixed += sum(network.seconds for network in pool)
    copies = splits(
        bench, itertools.repeat(genotypes[best]), fixed=fixed, seconds_per_epoch=pool[best].seconds / epochs
    )
    found += [replace(split, spent=f"best cell, {split.spent}") for split in copies]
    return found


METHODS: dict[str, Callable[[Bench], list[Split]]] = {
    "plain CNN": plain_cnn,
    "ResNet": resnet,
    "deep ensemble of the best found cell": best_found_cell,
    "random cells": random_cells,
    "random cells, darts": functools.partial(random_cells, space="darts"),
    "cells by the star alone": star_cells,
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    regimes: tuple[str, ...] = tuple(REGIMES)
    """Which regimes to run."""
    methods: tuple[str, ...] = (OURS, *METHODS)
    """Which methods to run."""
    first_seed: int = 0
    """The first seed."""
    seeds: int = 5
    """How many seeds."""
    workers: int = 1
    """Units side by side, each on one CPU core."""
    engine: Engine = "local"
    """local, or ray: tasks of the Ray cluster that RAY_ADDRESS names, else of a Ray of this machine."""
    output: Path = RESULTS / "budgets"
    """Where results go: OUTPUT-REGIME.md, .png and, with what each method took, .jsonl; cells that were found in
    genotypes/ beside them; every split and its losses in OUTPUT-units/."""

    def __post_init__(self) -> None:
        for name in self.regimes:
            require(name in REGIMES, f"There is no regime {name!r}.", f"Choose from {', '.join(REGIMES)}.")
        for name in self.methods:
            known = (OURS, *METHODS)
            require(name in known, f"There is no method {name!r}.", f"Choose from {', '.join(known)}.")
        require_positive(self, "seeds", "workers")

    @property
    def units(self) -> Path:
        """Where all splits of a unit are kept; too many to publish."""
        return with_ending(self.output, "-units")

    def arrays(self, record: Record) -> Path:
        """Return where the losses of a unit are."""
        name = f"{record['regime']}-{record['method'].replace(' ', '-').replace(',', '')}-{record['seed']}.npz"
        return self.units / name


def run_one(condition: tuple[str, str], seed: int) -> tuple[Record, dict[str, np.ndarray]]:
    """Run one method in one regime; return its splits, ours one for each budget, and their per-image losses."""
    torch.set_num_threads(1)
    # PyTorch imports its compiler with the first optimiser of a process; the two seconds are no method's.
    torch.optim.SGD([torch.zeros(())], lr=0.1)
    name, method = condition
    regime = REGIMES[name]
    bench = Bench(regime, seed)
    start = time.process_time()
    if method == OURS:
        grid = [our_split(bench, budget) for budget in regime.budgets]
    else:
        grid = [split for split in METHODS[method](bench) if split.seconds <= DEARER * regime.budgets[-1]]
    test_labels = bench.data.test.labels.numpy()
    entries, losses = [], []
    for split in grid:
        # A set that is chosen on val is scored without having been chosen on the images it is scored on.
        choose = best_set if split.spent.startswith("best of") else _everyone
        networks = [split.networks[index] for index in choose(split.val(), bench.labels)]
        val = np.stack([network.val for network in networks]).mean(axis=0, dtype=np.float64)
        test = np.stack([network.test for network in networks]).mean(axis=0, dtype=np.float64)
        losses.append(per_image_calibrated_nll(val, bench.labels, test, test_labels).astype(np.float32))
        entries.append(
            {
                "spent": split.spent,
                "cpu_seconds": split.seconds,
                "networks": len(networks),
                "val_nll": cross_fitted_loss(split.val(), bench.labels, choose=choose),
                "accuracy": float((test.argmax(axis=1) == test_labels).mean()),
                "calibrated_nll": float(losses[-1].mean()),
            }
        )
    record = {
        "regime": name,
        "method": method,
        "seed": seed,
        "budgets": list(regime.budgets),
        "splits": entries,
        "seconds": time.process_time() - start,
        "revision": environment([])["git_revision"],
    }
    return record, {"losses": np.stack(losses) if losses else np.zeros((0, len(test_labels)), dtype=np.float32)}


def _everyone(probs: np.ndarray, _: np.ndarray) -> list[int]:
    return list(range(len(probs)))


def taken(records: Sequence[Record], position: int) -> list[int] | None:
    """Return which split of each seed's record a method takes for the budget of a position; None where none fits.

    Ours has one for each. Another method takes the same split with all seeds: of those that all have, and that the
    budget pays for on average, the one with the least mean NLL on val. If each seed took its own, one would compare
    with the luckiest of a hundred draws, and not with a way to spend.
    """
    if records[0]["method"] == OURS:
        return [position] * len(records)
    places = [{entry["spent"]: index for index, entry in enumerate(record["splits"])} for record in records]
    best, least = None, np.inf
    for spent in set.intersection(*(set(place) for place in places)):
        chosen = [place[spent] for place in places]
        entries = [record["splits"][index] for record, index in zip(records, chosen, strict=True)]
        if np.mean([entry["cpu_seconds"] for entry in entries]) > records[0]["budgets"][position]:
            continue
        loss = float(np.mean([entry["val_nll"] for entry in entries]))
        if loss < least:
            best, least = chosen, loss
    return best


def our_split(bench: Bench, budget: float) -> Split:
    """Spend a budget as the command does; its seconds are those of all it did."""
    config = with_fields(search_preset("smoke"), seed=bench.seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        cells = StarCells(config, bench.data)
        spending = Spending(
            bench.data,
            bench.recipe,
            amount=Amount(total=budget),
            cells=cells,
            folder=Path(folder),
            clock=time.process_time,
        )
        ensemble = spending.run()
        seconds = time.process_time() - start
        spent = ", ".join(f"{done.unit.kind} {done.epochs}" for done in spending.history)
    networks = [bench.predicted(member, 0.0) for member in ensemble.members]  # type: ignore[arg-type]
    return Split(seconds=seconds, spent=spent, networks=networks)


def compared(records: Records, regime: str) -> dict[str, list[Record]]:
    """Return the records of every method of a regime that has some, of the seeds that all of them have, by seed."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["regime"] == regime:
            found.setdefault(record["method"], {})[record["seed"]] = record
    common = sorted(set.intersection(*(set(of_seeds) for of_seeds in found.values()))) if found else []
    return {method: [found[method][seed] for seed in common] for method in (OURS, *METHODS) if method in found}


def page(records: Records, regime: str) -> tuple[str, list[Record]]:
    """Return the tables of a regime and the differences from ours at every budget, as Markdown, and what was taken."""
    of_method = compared(records, regime)
    methods = [method for method, found in of_method.items() if found]
    text, published = "", []
    for position, budget in enumerate(REGIMES[regime].budgets):
        lines, losses = [], {}
        for method in methods:
            of_seeds = of_method[method]
            chosen = taken(of_seeds, position)
            if chosen is None:
                lines.append([method, str(len(of_seeds)), "costs more in itself", "", "", ""])
                continue
            rows = [record["splits"][index] for record, index in zip(of_seeds, chosen, strict=True)]
            published += [
                {"budget": budget, "method": method, "seed": record["seed"], **row, "revision": record["revision"]}
                for record, row in zip(of_seeds, rows, strict=True)
            ]
            lines.append(
                [
                    method,
                    str(len(rows)),
                    mean_and_deviation([row["calibrated_nll"] for row in rows], digits=4),
                    mean_and_deviation([100 * row["accuracy"] for row in rows], digits=2),
                    mean_and_deviation([row["cpu_seconds"] for row in rows], digits=0),
                    rows[0]["spent"] if method != OURS else "by val, see below",
                ]
            )
            losses[method] = [
                records.arrays((regime, method, record["seed"]))["losses"][index]
                for record, index in zip(of_seeds, chosen, strict=True)
            ]
        header = ["method", "seeds", "calibrated NLL", "accuracy, %", "CPU s", "split"]
        text += f"## {budget:g} CPU seconds\n\n{markdown_table(header, lines, text_columns=(0, 5))}\n"
        if OURS in losses:
            text += sentences({name: stacked(found) for name, found in losses.items()}) + "\n"
    ours = of_method.get(OURS, [])
    text += "## What ours was spent on\n\n" + "".join(
        f"- seed {record['seed']}, {budget:g} s: {row['spent']}; {row['networks']} networks join\n"
        for record in ours
        for budget, row in zip(record["budgets"], record["splits"], strict=True)
    )
    return text, published


def write_genotypes(folder: Path, records: Records, regime: str) -> None:
    """Write the cells that ours found with every seed, where it looks for some; `--genotypes` takes such a file."""
    torch.set_num_threads(1)
    for seed in [record["seed"] for record in records if (record["regime"], record["method"]) == (regime, OURS)]:
        file = folder / f"{regime}-seed-{seed}.json"
        if math.isfinite(FOUND[REGIMES[regime].augment]) and not file.exists():
            write_json(file, [cell.to_dict() for cell in found_by_star(seed, REGIMES[regime].load(seed))])


def plot(records: Records, regime: str, path: Path) -> None:
    """Draw the calibrated NLL of every method: its mean against the budget, or at a single budget that of each seed."""
    figure = new_figure(560, 340)
    axis = figure.subplots()
    budgets = REGIMES[regime].budgets
    losses: dict[str, dict[float, list[float]]] = {}
    for method, found in compared(records, regime).items():
        for position, budget in enumerate(budgets):
            if found and (chosen := taken(found, position)) is not None:
                rows = [record["splits"][index] for record, index in zip(found, chosen, strict=True)]
                losses.setdefault(method, {})[budget] = [row["calibrated_nll"] for row in rows]
    label = "calibrated NLL on test, nats"
    if len(budgets) == 1 and losses:
        of_seeds = np.array([found[budgets[0]] for found in losses.values()])
        # A line a seed: what differs between methods is compared seed by seed.
        axis.plot(of_seeds, color=LINE_COLOUR, linewidth=0.8, zorder=1)
        for place, (own, colour, marker) in enumerate(zip(of_seeds, CYCLE, MARKERS, strict=False)):
            axis.scatter(np.full(len(own), place), own, color=colour, marker=marker, s=30, zorder=2)
            axis.hlines(own.mean(), place - 0.22, place + 0.22, color=colour, linewidth=2.4, zorder=3)
        axis.set_xlim(-0.5, len(of_seeds) - 0.5)
        axis.set_xticks(range(len(of_seeds)), [textwrap.fill(method, 18) for method in losses])
        style_axis(axis, x_label=f"{budgets[0]:g} CPU seconds in all; a dot a seed, bars their means", y_label=label)
    else:
        for (method, of_budgets), colour, marker in zip(losses.items(), CYCLE, MARKERS, strict=False):
            points = [(budget, float(np.mean(own))) for budget, own in of_budgets.items()]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=method, linewidth=1.6)
        axis.set_xscale("log")
        axis.set_xticks(budgets, [f"{budget:g}" for budget in budgets], minor=False)
        axis.minorticks_off()
        style_axis(axis, x_label="CPU seconds in all", y_label=label)
        axis.legend(frameon=False, prop=font(9))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    records = Records(
        study.units / "units.jsonl",
        key=("regime", "method", "seed"),
        settings=lambda record: {"budgets": list(REGIMES[record["regime"]].budgets)},
        arrays=study.arrays,
    )
    conditions = [(regime, method) for regime in study.regimes for method in study.methods]
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    tasks: dict[Hashable, Task] = {
        (*condition, seed): functools.partial(run_one, condition, seed) for seed in seeds for condition in conditions
    }
    with worker_pool(study.workers, engine=study.engine) as pool:
        run_missing(
            records,
            tasks,
            pool=pool,
            said=lambda record: (
                f"{record['regime']}, {record['method']}, seed {record['seed']}: {len(record['splits'])} splits "
                f"({record['seconds']:.0f} s)"
            ),
        )
    for regime in study.regimes:
        revisions = sorted({str(record["revision"]) for record in records if record["regime"] == regime})
        output = with_ending(study.output, f"-{regime}")
        tables, published = page(records, regime)
        text = (
            f"# What is worth most at equal seconds? ({regime})\n\n"
            + provenance(environment([*PROG.split(), *argv]), hardware="no GPU, one thread a unit")
            + f" Revisions of all runs: {', '.join(revisions)}.\n\n"
            "Mean ± standard deviation over seeds of search, training and split. Every method but ours takes one "
            "split with all seeds, the one that val prefers in hindsight, and pays for that split alone; ours pays for "
            "all it tried.\n\n" + tables
        )
        write_study(output, text, figure=functools.partial(plot, records, regime), records=published)
        write_genotypes(output.parent / "genotypes", records, regime)


if __name__ == "__main__":
    run_script(main)
