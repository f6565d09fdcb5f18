"""Options, the frontier, and both budgets of given predictions and costs."""

import re
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from dnas_ens.compare.budgets import equal_cost, unspent_sentences
from dnas_ens.compare.figure import plot_frontiers
from dnas_ens.compare.frontier import Option, Trained, best_within, frontier, of_exchangeable, of_ordered
from dnas_ens.compare.methods.comparison import Comparison, Result
from dnas_ens.compare.methods.searched import LEAST_CROSSED, weighted
from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles.weighting import fit_weights
from dnas_ens.metrics.calibration import per_image_calibrated_nll


def some_predictions(images=60, seed=0):
    return tiny.predictions(4, images, 3, sharpness=0.0, seed=seed, parameters=[1] * 4)


def nll(probs, labels, inverse=1.0):
    return -log_softmax(inverse * np.log(probs), axis=1)[np.arange(len(labels)), labels].mean()


def by_hand(predictions, subset):
    """NLL on val, and calibrated NLL and accuracy on test."""
    val = predictions.val_probs[list(subset)].mean(axis=0)
    test = predictions.test_probs[list(subset)].mean(axis=0)
    prior = 2 / len(predictions.val_labels)
    fitted = minimize_scalar(
        lambda inverse: nll(val, predictions.val_labels, inverse) + prior * np.log(inverse) ** 2,
        bounds=(0.05, 20),
        method="bounded",
    )
    return (
        nll(val, predictions.val_labels),
        nll(test, predictions.test_labels, fitted.x),
        (test.argmax(axis=1) == predictions.test_labels).mean(),
    )


def figures(option):
    return option.val_nll, option.calibrated_nll, option.hits.mean()


def made(cost, val, test):
    figures = {"val_nll": val, "losses": np.full(2, test), "hits": np.ones(2)}
    return Option(members=1, epochs=1, cpu_seconds=cost, spent=f"{cost}", **figures)


def test_a_frontier_by_hand():
    first = [made(*values) for values in ((3, 0.5, 0.60), (1, 0.9, 0.80), (5, 0.7, 0.10), (7, 0.4, 0.70))]
    # Cost 5 would be best on test, but val prefers what costs 3; cost 7 is worse on test and taken all the same.
    assert frontier([first]) == ([1, 3, 5, 7], [0.8, 0.6, 0.6, 0.7])
    second = [made(*values) for values in ((2, 0.9, 0.40), (6, 0.1, 0.20))]
    budgets, heights = frontier([first, second])
    # With less than 2 the second seed can afford nothing.
    assert budgets == [2, 3, 5, 6, 7]
    assert heights == pytest.approx([0.6, 0.5, 0.5, 0.4, 0.45])
    # Every budget of one seed may be too small for the other.
    assert frontier([first, [made(9, 0.1, 0.1)]])[0] == [9]


def test_the_best_within_a_budget_is_vals_and_the_cheapest_of_equals():
    options = [made(*values) for values in ((4, 0.3, 1), (2, 0.3, 2), (1, 0.5, 3), (8, 0.1, 4))]
    assert best_within(options, 5) is options[1]
    assert best_within(options, 1.5) is options[2]
    assert best_within(options, 8) is options[3]
    assert best_within(options, 0.5) is None


@pytest.mark.parametrize("size", [1, 3])
def test_exchangeable_members_are_the_mean_over_all_subsets(size):
    """For 1 and n - 1 of n members the balanced subsets are all there are."""
    predictions = some_predictions()
    trained = Trained(predictions=predictions, seconds=[1.0, 2.0, 3.0, 6.0], epochs=7)
    option = of_exchangeable(trained, fixed_seconds=10.0)[size - 1]
    expected = np.mean([by_hand(predictions, subset) for subset in combinations(range(4), size)], axis=0)
    np.testing.assert_allclose(figures(option), expected, atol=1e-5)
    assert (option.members, option.epochs, option.spent) == (size, 7, f"{size} × 7")
    assert option.cpu_seconds == pytest.approx(10 + 3 * size)


def test_ordered_members_are_taken_in_their_order():
    predictions = some_predictions(seed=1)
    trained = Trained(predictions=predictions, seconds=[1.0, 2.0, 3.0, 6.0], epochs=7)
    options = of_ordered(trained, fixed_seconds=10.0)
    assert [option.cpu_seconds for option in options] == [11, 13, 16, 22]
    for size, option in enumerate(options, start=1):
        np.testing.assert_allclose(figures(option), by_hand(predictions, range(size)), atol=1e-5)


def of_seeds(*seeds):
    """Rows with an option for each cost."""

    def option(cost):
        losses = np.linspace(0.1, cost / 50, 8)
        figures = {"losses": losses, "hits": np.ones(8), "spent": "1 × 1"}
        return Option(members=1, epochs=1, cpu_seconds=cost, val_nll=1.0, **figures)

    def result(name, costs):
        return Result(name=name, predictions=None, networks=1, cpu_seconds=0, options=list(map(option, costs)))

    return [[result(name, costs) for name, costs in of_seed.items()] for of_seed in seeds]


def test_what_one_seed_cannot_pay_for_is_no_row_but_told():
    results = of_seeds(*2 * [{"ours": [90], "dear": [101, 130], "cheap": [80]}])
    rows, text = equal_cost(results, {5: [100, 120]})
    assert [row["name"] for row in rows] == ["ours", "ours", "cheap", "cheap"]
    assert re.search(r"^\| dear +\| costs more in itself +\|.*\| 101\.0 ± 0\.0 \|$", text, re.MULTILINE)
    assert "###" not in text
    rows, text = equal_cost(results, {5: [100, 120], 8: [110, 120]})
    assert [row["members_of_ours"] for row in rows if row["name"] == "dear"] == [8, 8]
    assert text.count("costs more in itself") == 1
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [f"### The total cost of ours with {size} members" for size in (5, 8)]


def test_methods_that_could_have_spent_more_are_named():
    results = of_seeds(
        {"ours": [60, 100], "short": [70, 35], "long": [90], "part": []},
        {"ours": [120, 200], "short": [100], "long": [140], "part": []},
    )
    # Shares of the budgets: short (0.7 + 0.5) / 2, long (0.9 + 0.7) / 2, which is enough.
    assert unspent_sentences(results, [100, 200]) == (
        "- Of *short* nothing was trained that costs more than 60 % of this; for all of it there might be better.\n"
    )


def test_weights_and_temperature_come_from_different_halves_of_a_large_val():
    def fit(probs, labels):
        return fit_weights(probs, labels).weights

    given = some_predictions(images=LEAST_CROSSED)
    found = weighted(given, fit)
    assert found["predictions"].weights == pytest.approx(fit(given.val_probs, given.val_labels))
    losses = []
    halves = alternating_halves(given.val_labels)
    for own, other in (halves, halves[::-1]):
        weights = fit(given.val_probs[:, own], given.val_labels[own])
        val, test = (np.tensordot(weights, probs, 1) for probs in (given.val_probs[:, other], given.test_probs))
        losses.append(per_image_calibrated_nll(val, given.val_labels[other], test, given.test_labels))
    np.testing.assert_allclose(found["cross_fit"].per_image_calibrated_nll, np.mean(losses, axis=0))
    # A small val is not halved.
    assert "cross_fit" not in weighted(some_predictions(images=LEAST_CROSSED - 1), fit)


def test_a_name_with_dollars_is_drawn_as_it_is(tmp_path):
    results = of_seeds({"ours": [60, 100], "other": [50, 90]})
    results = [[replace(result, label=result.name) for result in of_seed] for of_seed in results]
    plot_frontiers(results, budgets={"our total cost": 100.0}, title="prices_$5_to_$10", path=tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 0


def test_what_is_trained_alone_has_the_threads_of_a_member():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for workers, members, threads in ((0, 2, 2), (1, 2, 4), (0, 9, 1)):
            of_run = SimpleNamespace(workers=workers, num_members=members)
            with Comparison.threads_of_a_member(of_run):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
