"""One cell, several seeds: deep ensembles of the base and of the best cell that was found, and one wide network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dnas_ens.compare.frontier import Trained, of_exchangeable
from dnas_ens.compare.methods.comparison import Comparison, Result, affordable_networks
from dnas_ens.evaluate.tables import best_single
from dnas_ens.training.trainer import MemberTraining


def base_members(comparison: Comparison) -> Trained:
    """Train as many networks of the base cell as our largest cost would pay for if the cell were free, at least M."""
    return comparison.train_within(
        "base-cell",
        lambda wanted: [comparison.base] * wanted,
        first=comparison.num_members,
        seconds=comparison.largest_seconds,
    )


def base_cell(comparison: Comparison) -> Iterator[Result]:
    """Deep ensembles of the base cell: of M members, and of as many as our whole cost trains if the cell were free.

    The options of the latter, each the mean over subsets, are the measured curve that the deep-ensemble equivalent of
    any row (arXiv 2002.06470) is read off from.
    """
    count, everyone = comparison.num_members, base_members(comparison)
    affordable = affordable_networks(everyone.seconds[:count], comparison.total_seconds)
    others = comparison.at_other_epochs("base-cell", [comparison.base] * affordable)
    free = [option for trained in (everyone, *others) for option in of_exchangeable(trained)]
    search = comparison.search_seconds
    yield Result.of_all(
        everyone.first(count),
        searching=search,
        name="deep ensemble of the base cell",
        label="deep ensemble, base cell",
        options=[replace(option, cpu_seconds=search + option.cpu_seconds) for option in free],
    )
    yield Result.of_all(
        everyone.first(affordable),
        name="the same at our cost, cell for free",
        label="deep ensemble, base cell for free",
        detail=f"{affordable} members",
        options=free,
    )


def best_cell(comparison: Comparison) -> Iterator[Result]:
    """The bar to clear: a deep ensemble of the best cell that the search found, by its retrained member on val.

    The row has M fresh copies of it. An option is the member itself, which is paid for, with k copies.
    """
    members, count = comparison.members, comparison.num_members
    best = best_single(members.predictions)
    # Finding out which cell is best took the training of our members.
    fixed = comparison.total_seconds
    copies = comparison.train_within(
        "best-cell",
        lambda wanted: [comparison.genotypes[best]] * wanted,
        first=count,
        seconds=comparison.largest_seconds - fixed,
    )
    with_best = members.predictions.of_members([best]).with_members_of(copies.predictions)
    yield Result.of_all(
        copies.first(count),
        searching=comparison.search_seconds,
        fixed=fixed,
        name="deep ensemble of the best found cell",
        label="deep ensemble, best found cell",
        networks=2 * count,
        options=of_exchangeable(replace(copies, predictions=with_best), fixed_seconds=fixed, paid=1),
    )


def wider(comparison: Comparison) -> Iterator[Result]:
    """One network of the base cell with as many parameters as our members together (arXiv 2202.06985)."""
    channels = width_for(comparison, sum(comparison.members.predictions.parameters))
    trained = comparison.train("wider", [comparison.base], channels=channels)
    yield Result.of_all(
        trained,
        searching=comparison.search_seconds,
        name="one network as large, of the base cell",
        label="one wide network",
        detail=f"C={channels}",
    )


def width_for(comparison: Comparison, wanted: int) -> int:
    """Return the channels with which a network of the base cell has as many parameters, at least."""

    def parameters(channels: int) -> int:
        recipe = replace(comparison.recipe, channels=channels)
        return MemberTraining(comparison.base, comparison.data, recipe, index=0).num_parameters

    channels = comparison.recipe.channels
    while parameters(channels) < wanted:
        channels += 2
    return channels
