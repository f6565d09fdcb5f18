"""Differential evolution over the coefficients that average the weights of given networks.

scipy's best1bin (Storn and Price, Journal of Global Optimization 11, 1997) looks for e in w = e w_1 + (1 - e) w_2
of two networks, or for a point of the simplex over k networks, one for the whole network or one for every layer.
Every candidate gets BatchNorm statistics of its own from training batches before validation batches judge it.

Legend: k networks, G groups of tensors (1, or the layers), N validation images, K classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.optimize import Bounds, differential_evolution
from torch import Tensor, nn
from tqdm import tqdm

from dnas_ens.ensembles.averaging import (
    State,
    as_state,
    average_states,
    check_fit,
    clone,
    copied_to_cpu,
    recompute_batch_norm,
)
from dnas_ens.ensembles.weighting import Criterion, criterion_value, to_simplex
from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import PROB_FLOOR, accuracy, check_predictions, labels_digest, nll
from dnas_ens.run.files import read_json, tensors_to_bytes, unreadable, write_json
from dnas_ens.training.prediction import Batches, one_pass, predict_batches, predict_members
from dnas_ens.types import FloatArray, IntArray

_WHOLE_NETWORK = "network"
# Coefficients that agree in so many decimals are one candidate: scipy scales a start back and forth.
_DECIMALS = 12
# New scores after which the file is written; a score takes far longer than that.
_SAVE_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class EvolutionSettings:
    """How a differential evolution goes.

    Args:
        criterion: What validation data judge by: "nll", or "accuracy" with ties broken by the NLL.
        population_size: Points of a generation, 5 or more; raised to the number of starts + 4.
        generations: Generations after the first, 1 or more; fewer where the population has converged.
        batch_norm_batches: Training batches to recompute BatchNorm statistics from; None for a whole pass.
        seed: Of the first generation and of the evolution.

    Raises:
        UserError: A value that is not possible.
    """

    criterion: Criterion = "nll"
    population_size: int = 16
    generations: int = 10
    batch_norm_batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        criterion_value(0.0, 0.0, num_images=1, criterion=self.criterion)
        if self.population_size < 5:
            raise UserError(f"A population of {self.population_size} is too small.", "Give 5 or more.")
        if self.generations < 1:
            raise UserError(f"{self.generations} generations were asked for.", "Ask for 1 or more.")
        if self.batch_norm_batches is not None and self.batch_norm_batches < 1:
            raise UserError(
                f"{self.batch_norm_batches} batches for BatchNorm were asked for.",
                "Ask for 1 or more, or None.",
            )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One combination of the networks' weights and what it reaches on validation data.

    Args:
        coefficients: Share of every network in every group, shape (G, k); a row sums to 1.
        val_nll: NLL in nats; 27.6 where the logits are not finite.
        val_accuracy: Accuracy in [0, 1]; 0 where the logits are not finite.
    """

    coefficients: FloatArray
    val_nll: float
    val_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """What an evolution found, beside what it must be compared with; all on validation data.

    Args:
        best: The best candidate of all that were evaluated, by the criterion.
        state: Its state, BatchNorm statistics recomputed, on the CPU.
        groups: What the rows of the coefficients are of, length G: ("network",) or names of layers.
        starts: Every network alone and their uniform average, in this order, judged like any candidate.
        curve: Two networks: candidates over a grid of e, ascending, with coefficients (e, 1 - e). Else empty.
        evaluations: Different candidates of the evolution, the starts counted and the curve not.
        ensemble_val_nll: NLL of the mean of the same networks' predictions, in nats; they have recomputed
            BatchNorm statistics too, so that nothing but the way of combining differs.
        ensemble_val_accuracy: Accuracy of that mean, in [0, 1].
    """

    best: Candidate
    state: dict[str, Tensor]
    groups: tuple[str, ...]
    starts: tuple[Candidate, ...]
    curve: tuple[Candidate, ...]
    evaluations: int
    ensemble_val_nll: float
    ensemble_val_accuracy: float

    @property
    def coefficient(self) -> float:
        """The e of two networks that were combined as whole networks: the first one's share."""
        return float(self.best.coefficients[0, 0])


def evolve_interpolation(
    model: nn.Module,
    first: State | nn.Module,
    second: State | nn.Module,
    training_batches: Batches,
    val_batches: Batches,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    curve_points: int = 21,
    settings: EvolutionSettings | None = None,
    file: str | Path | None = None,
) -> Evolution:
    """Find e in w = e w_first + (1 - e) w_second, and the curve of NLL and accuracy over e.

    The result is never worse by the criterion on validation data than either network alone or their uniform
    average, because these are in the first generation.

    Args:
        model: A module of the architecture; it is left as it is.
        training_batches: For BatchNorm. The first ones are taken at every evaluation: batches that are shuffled
            or augmented again make the criterion noisy, and an evolution then favours a lucky draw.
        val_batches: Validation batches, in the same order at every call.
        bounds: Range of e; outside of [0, 1] the line is extrapolated, as in [-0.5, 1.5].
        curve_points: Points of the grid over the range, to which e = 0 and e = 1 are added; 0 for no curve.
        file: JSON file that makes the evolution resumable; see `evolve_simplex`.

    Returns:
        The evolution; ``coefficient`` is e.

    Raises:
        UserError: Bounds without 0 or 1, a negative number of points; else see `evolve_simplex`.
    """
    low, high = bounds
    if not (np.isfinite([low, high]).all() and low <= 0.0 and high >= 1.0):
        raise UserError(
            f"The range of e is {low} to {high}.", "Give one with 0 and 1 in it, where the two networks are."
        )
    if curve_points < 0:
        raise UserError(f"A curve of {curve_points} points was asked for.", "Ask for 0 or more.")

    def on_line(points: FloatArray) -> FloatArray:
        return np.concatenate([points, 1.0 - points])[None]

    problem = _Problem(model, [first, second], training_batches, val_batches, settings, layers=False, file=file)
    return problem.evolve(
        on_line,
        bounds=Bounds(np.array([low]), np.array([high])),
        starts=np.array([[1.0], [0.0], [0.5]]),
        drawn=lambda generator, count: generator.uniform(low, high, size=(count, 1)),
        curve=sorted({*np.linspace(low, high, curve_points).round(_DECIMALS), 0.0, 1.0}) if curve_points else [],
    )


def evolve_simplex(
    model: nn.Module,
    states: Sequence[State | nn.Module],
    training_batches: Batches,
    val_batches: Batches,
    *,
    per_layer: bool = False,
    settings: EvolutionSettings | None = None,
    file: str | Path | None = None,
) -> Evolution:
    """Find coefficients c >= 0 with sum 1 in w = sum_i c_i w_i, for the network or for every layer.

    Points of [0, 1]^(G k) are scaled to sum 1 group by group. The result is never worse by the criterion on
    validation data than any network alone or their uniform average, because these are in the first generation.

    A ``file`` keeps the score of every candidate. An evolution is fixed by its seed, so a later call with the
    same arguments repeats it from the file without running a network, continues where it was interrupted, and
    finds what an uninterrupted one finds; more generations prolong it. Batches are not in the file: they must
    be the same.

    Args:
        model: A module of the architecture; it is left as it is.
        states: k states or modules of that architecture.
        training_batches: For BatchNorm; see `evolve_interpolation`.
        val_batches: Validation batches, in the same order at every call.
        per_layer: Whether every layer has coefficients of its own: every submodule with tensors of its own, such as
            a convolution, or a BatchNorm with its running statistics.
        file: JSON file that makes the evolution resumable; None for none.

    Raises:
        UserError: States that do not fit (see `dnas_ens.ensembles.averaging.check_fit`), no batches, or a file
            that belongs to another evolution.
    """
    problem = _Problem(model, states, training_batches, val_batches, settings, layers=per_layer, file=file)
    groups, networks = len(problem.groups), len(states)
    corners = np.concatenate([np.eye(networks), np.full((1, networks), 1.0 / networks)])
    return problem.evolve(
        lambda points: to_simplex(points.reshape(groups, networks)),
        bounds=Bounds(np.zeros(groups * networks), np.ones(groups * networks)),
        starts=np.tile(corners, groups),
        drawn=lambda generator, count: generator.dirichlet(np.ones(networks), (count, groups)).reshape(count, -1),
        curve=[],
    )


class _Problem:
    """Combinations of one set of networks and their scores, looked up where they are known already."""

    def __init__(
        self,
        model: nn.Module,
        states: Sequence[State | nn.Module],
        training_batches: Batches,
        val_batches: Batches,
        settings: EvolutionSettings | None,
        *,
        layers: bool,
        file: str | Path | None,
    ) -> None:
        check_fit(model, states)
        self.settings = EvolutionSettings() if settings is None else settings
        self.model = clone(model).eval()
        self.states = [dict(as_state(state)) for state in states]
        self.names_of: dict[str, list[str]] = {}
        for name in self.states[0]:
            layer = name.rpartition(".")[0] if layers else ""
            self.names_of.setdefault(layer or _WHOLE_NETWORK, []).append(name)
        self.groups = tuple(self.names_of)
        self.val_batches = val_batches
        self.training_batches: Batches = lambda: islice(one_pass(training_batches), self.settings.batch_norm_batches)
        self.file = None if file is None else Path(file)
        self.header: dict[str, Any] = {}
        self.known: dict[bytes, Candidate] = {}
        self.unsaved = 0

    def evolve(
        self,
        coefficients_of: Callable[[FloatArray], FloatArray],
        *,
        bounds: Bounds,
        starts: FloatArray,
        drawn: Callable[[np.random.Generator, int], FloatArray],
        curve: Iterable[float],
    ) -> Evolution:
        """Run scipy's evolution over points that `coefficients_of` maps to (G, k)."""
        ensemble, labels = predict_members(
            (self.combine(np.tile(row, (len(self.groups), 1))) for row in np.eye(len(self.states))),
            self.val_batches,
        )
        ensemble_nll, ensemble_accuracy = _metrics(ensemble.mean(axis=0), labels)
        if self.file is not None:
            self._take_file(self.file, labels)
        generator = np.random.default_rng(self.settings.seed)
        size = max(self.settings.population_size, len(starts) + 4)
        population = np.concatenate([starts, drawn(generator, size - len(starts))])
        visited: dict[bytes, Candidate] = {}

        def value(candidate: Candidate) -> float:
            reached = candidate.val_nll, candidate.val_accuracy
            return float(criterion_value(*reached, num_images=len(labels), criterion=self.settings.criterion))

        def candidate_at(point: FloatArray) -> Candidate:
            return self.candidate(coefficients_of(point))

        total = size * (self.settings.generations + 1)
        bar = tqdm(total=total, desc="evolution", unit="evaluation", disable=None, leave=False)

        def objective(point: FloatArray) -> float:
            candidate = candidate_at(point)
            visited.setdefault(candidate.coefficients.tobytes(), candidate)
            bar.update(1)
            return value(candidate)

        try:
            with bar:
                # Before scipy, which would hide what is wrong with the data behind an error of its own.
                judged = tuple(candidate_at(point) for point in starts)
                visited.update((candidate.coefficients.tobytes(), candidate) for candidate in judged)
                if len(self.states) > 1:
                    differential_evolution(
                        cast(Any, objective),
                        bounds=bounds,
                        init=population,
                        maxiter=self.settings.generations,
                        # A relative tolerance would stop where NLLs of a good population are alike.
                        tol=0.0,
                        atol=1e-6,
                        polish=False,
                        seed=generator,
                    )
            points = tuple(candidate_at(np.array([position])) for position in curve)
        finally:
            # Also after an interruption: everything that was evaluated is kept.
            self._save()
        best = min(visited.values(), key=value)
        return Evolution(
            best=best,
            state=copied_to_cpu(self.combine(best.coefficients).state_dict()),
            groups=self.groups,
            starts=judged,
            curve=points,
            evaluations=len(visited),
            ensemble_val_nll=ensemble_nll,
            ensemble_val_accuracy=ensemble_accuracy,
        )

    def combine(self, coefficients: FloatArray) -> nn.Module:
        """Load a combination (G, k) into the module, with BatchNorm statistics of its own."""
        averaged: dict[str, Tensor] = {}
        for shares, names in zip(coefficients, self.names_of.values(), strict=True):
            parts = [{name: state[name] for name in names} for state in self.states]
            averaged |= average_states(parts, shares)
        self.model.load_state_dict(averaged)
        recompute_batch_norm(self.model, self.training_batches)
        return self.model

    def candidate(self, coefficients: FloatArray) -> Candidate:
        """Return the candidate of coefficients (G, k), judged on validation data unless it is known."""
        coefficients = np.round(coefficients, _DECIMALS) + 0.0  # no -0
        key = coefficients.tobytes()
        if key not in self.known:
            val_nll, val_accuracy = _metrics(*predict_batches(self.combine(coefficients), self.val_batches))
            self.known[key] = Candidate(coefficients=coefficients, val_nll=val_nll, val_accuracy=val_accuracy)
            self.unsaved += 1
            if self.unsaved >= _SAVE_EVERY:
                self._save()
        return self.known[key]

    def _take_file(self, file: Path, labels: IntArray) -> None:
        """Take the candidates of a file; its header says what their scores depend on, as far as that can be told."""
        digest = hashlib.sha256()
        for state in self.states:
            digest.update(tensors_to_bytes({name: v for name, v in state.items() if isinstance(v, Tensor)}))
        self.header = {
            "networks": digest.hexdigest(),
            "batch_norm_batches": self.settings.batch_norm_batches,
            "labels": labels_digest(labels),
        }
        if not file.exists():
            return
        content = read_json(file)
        try:
            found = content["scores_of"]
            for entry in content["candidates"]:
                coefficients = np.array(entry["coefficients"], dtype=np.float64)
                self.known[coefficients.tobytes()] = Candidate(
                    coefficients=coefficients,
                    val_nll=float(entry["val_nll"]),
                    val_accuracy=float(entry["val_accuracy"]),
                )
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(file, f"it is not the file of an evolution ({error!r})") from error
        if found != self.header:
            raise UserError(
                f"{file} holds scores of other networks or data: {found} instead of {self.header}.",
                "Name another file, or delete this one to start again.",
            )

    def _save(self) -> None:
        """Write the file if there is anything new."""
        if self.file is not None and self.unsaved:
            entries = [{**vars(each), "coefficients": each.coefficients.tolist()} for each in self.known.values()]
            write_json(self.file, {"scores_of": self.header, "candidates": entries})
            self.unsaved = 0


def _metrics(probs: FloatArray, labels: IntArray) -> tuple[float, float]:
    """Return NLL and accuracy; the worst possible values where a probability is not finite."""
    if not np.isfinite(probs).all():
        return -math.log(PROB_FLOOR), 0.0
    checked = check_predictions(probs, labels)
    return nll.of(*checked), accuracy.of(*checked)
