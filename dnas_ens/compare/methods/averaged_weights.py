"""One network made from many: averages of the weights of one training, and a point between two trainings.

Legend: M members of the searched ensemble, n models that are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from dnas_ens.compare.frontier import Option, option
from dnas_ens.compare.methods.comparison import Comparison, Result
from dnas_ens.compare.methods.copies import base_members
from dnas_ens.compare.methods.long_training import long_epochs, train_long
from dnas_ens.ensembles.averaging import (
    CoefficientKind,
    ExponentialMovingAverage,
    averaged_model,
    coefficients,
    copied_to_cpu,
)
from dnas_ens.ensembles.evolution import EvolutionSettings, evolve_interpolation, evolve_simplex
from dnas_ens.ensembles.soups import evaluate_on_val, greedy_soup
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.run.files import load_tensors
from dnas_ens.run.progress import CostMeter
from dnas_ens.training.step import cosine_to_constant
from dnas_ens.training.trainer import MemberTraining

#: The models of the last epochs are kept, this share of all; SWA's schedule (arXiv 1803.05407).
KEPT_SHARE = 0.25
#: So many models at most: with more epochs than that, one is kept every few.
MOST_KEPT = 10
#: Of the learning rate at the beginning, what is left while models are kept.
AVERAGING_RATE = 0.4
#: Candidates of differential evolution, and generations after the first.
POPULATION, GENERATIONS = 8, 4
#: Name of a row: rule of the coefficients.
RULES: dict[str, CoefficientKind] = {
    "equal average of the last models of one training": "equal",
    "its linearly decaying average": "linear",
    "its exponentially decaying average": "exponential",
}
EVOLVED, SOUP, EMA, LAST = (
    "its average with evolved coefficients",
    "its greedy soup",
    "its moving average (EMA)",
    "its last model alone",
)
STOP = "equal average of the first {} of {} kept"


class _Averages:
    """A learning rate that falls and then stays constant, the models of its last epochs, and an EMA of every step.

    The EMA's window is about an epoch.
    """

    def __init__(self, comparison: Comparison, training: MemberTraining) -> None:
        epochs = long_epochs(comparison)
        constant = min(epochs, max(2, round(KEPT_SHARE * epochs)))
        self.begin, self.cycle = epochs - constant, -(-constant // MOST_KEPT)
        self.training = training
        self.ema = ExponentialMovingAverage(training.network, decay=1.0 - 1.0 / training.steps_per_epoch)
        self.states: list[dict[str, Tensor]] = []
        self.epochs: list[int] = []

    def learning_rate(self, epoch: int) -> float:
        first = self.training.recipe.learning_rate
        return cosine_to_constant(first, AVERAGING_RATE * first, epoch=epoch, begin=self.begin)

    def after_step(self) -> None:
        self.ema.after_step(self.training.network)

    def after_epoch(self, epochs_done: int) -> None:
        kept_for = epochs_done - self.begin
        if kept_for > 0 and kept_for % self.cycle == 0:
            self.states.append(copied_to_cpu(self.training.network.state_dict()))
            self.epochs.append(epochs_done)

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.ema.state_dict(), "states": self.states, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ema.load_state_dict(state["ema"])
        self.states, self.epochs = list(state["states"]), list(state["epochs"])


def averaged_weights(comparison: Comparison) -> Iterator[Result]:
    """Averages of one training's weights: equal (SWA), linear, exponential, evolved, a greedy soup and an EMA.

    One network of the base cell is trained as long as our M members, at the end with a constant learning rate. How
    many models an average takes, the soup and evolved coefficients are chosen on val. As the learning rate is constant,
    the training could have ended with any of the kept models: those are its options.
    """

    def make() -> tuple[Predictions, dict[str, Any]]:
        training, averages, seconds = train_long(
            comparison, "averaged-weights", lambda training: _Averages(comparison, training)
        )
        models, making, details = _average(comparison, training.network, averages)
        made = {"training_seconds": seconds, "making": making, "details": details, "epochs": averages.epochs}
        return comparison.predict(models.values()), made | {"rows": list(models)}

    predictions, made = comparison.kept("averaged-weights", make)
    search, training = comparison.search_seconds, float(made["training_seconds"])
    place = {name: index for index, name in enumerate(made["rows"])}
    seconds = {name: search + training + making for name, making in made["making"].items()}
    stops, total = made["epochs"], long_epochs(comparison)

    def option_of(name: str, *, epochs: int = total, spent: str = "") -> Option:
        unspent = (1.0 - epochs / total) * training
        cost = [seconds[name] - unspent]
        return option(predictions, [[place[name]]], cpu_seconds=cost, epochs=epochs, spent=spent or name)

    rows = [*RULES, EVOLVED, SOUP, EMA, LAST]
    options = [
        *(
            option_of(STOP.format(count, len(stops)), epochs=stop, spent=f"{count} averaged, {stop} epochs")
            for count, stop in enumerate(stops, start=1)
        ),
        *map(option_of, rows),
    ]
    for position, name in enumerate(rows):
        yield Result(
            name=name,
            label="" if position else "averaged weights",
            detail=made["details"].get(name, ""),
            predictions=predictions.of_members([place[name]]),
            networks=1,
            cpu_seconds=seconds[name],
            search_seconds=search,
            options=() if position else options,
        )


def _average(
    comparison: Comparison, network: nn.Module, averages: _Averages
) -> tuple[dict[str, nn.Module], dict[str, float], dict[str, str]]:
    """Make every row's model and that of every option: models, CPU seconds of making each, what was found."""
    states, (training_batches, val_batches) = averages.states, comparison.passes
    counts = range(1, len(states) + 1)
    models: dict[str, nn.Module] = {}
    making: dict[str, float] = {}
    details: dict[str, str] = {}
    meter = CostMeter()

    def keep(name: str, model: nn.Module, detail: str = "") -> None:
        nonlocal meter
        models[name], making[name], details[name] = model, meter.seconds()["cpu_seconds"], detail
        meter = CostMeter()

    for name, kind in RULES.items():
        # Not by `averaging_curve`: it returns no models, and scores every single one again for each rule.
        found: list[nn.Module] = [
            averaged_model(network, states[-count:], coefficients(kind, count), training_batches) for count in counts
        ]
        best = int(np.argmin([evaluate_on_val(model, val_batches)[0] for model in found]))
        keep(name, found[best], f"n={best + 1} of {len(states)}")
    settings = EvolutionSettings(population_size=POPULATION, generations=GENERATIONS)
    evolution = evolve_simplex(network, states, training_batches, val_batches, settings=settings)
    evolved = comparison.network()
    evolved.load_state_dict(evolution.state)
    keep(EVOLVED, evolved)
    soup = greedy_soup(network, states, training_batches, val_batches)
    keep(SOUP, soup.model, f"n={len(soup.ingredients)}")
    keep(EMA, averages.ema.finished(training_batches))
    keep(LAST, averaged_model(network, states[-1:], None, training_batches))
    for count in counts:
        average = averaged_model(network, states[:count], None, training_batches)
        keep(STOP.format(count, len(states)), average)
    return models, making, details


def evolved_network(comparison: Comparison) -> Iterator[Result]:
    """One network w = e w_1 + (1 - e) w_2 of two networks of the base cell, e by differential evolution on val."""
    if comparison.num_members < 2:
        return
    networks = base_members(comparison)

    def make() -> tuple[Predictions, dict[str, Any]]:
        model = comparison.network()
        settings = EvolutionSettings(population_size=POPULATION, generations=GENERATIONS)
        members = comparison.baseline("base-cell") / "members"
        first, second = (load_tensors(members / str(index) / "model.safetensors") for index in (0, 1))
        cost = CostMeter()
        found = evolve_interpolation(model, first, second, *comparison.passes, curve_points=0, settings=settings)
        model.load_state_dict(found.state)
        return comparison.predict([model]), {
            "cpu_seconds": cost.seconds()["cpu_seconds"],
            "coefficient": found.coefficient,
            "evaluations": found.evaluations,
        }

    predictions, made = comparison.kept("evolved-network", make)
    search = comparison.search_seconds
    seconds = search + sum(networks.seconds[:2]) + float(made["cpu_seconds"])
    spent = f"1 between 2 × {networks.epochs}"
    yield Result(
        name="one network between two of the base cell (differential evolution)",
        label="evolved network",
        detail=f"e={made['coefficient']:.2f}",
        predictions=predictions,
        networks=2,
        cpu_seconds=seconds,
        search_seconds=search,
        options=[option(predictions, [[0]], cpu_seconds=[seconds], epochs=networks.epochs, spent=spent)],
    )
