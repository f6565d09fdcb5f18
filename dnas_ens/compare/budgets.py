"""Equal total cost: each method spends it as is best on val, and is compared with ours.

Legend: S seeds; results are those of every seed, the same rows in the same order, ours first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dnas_ens.compare.frontier import Option, best_within
from dnas_ens.compare.methods.comparison import Result
from dnas_ens.compare.tables import merged_value, sentences, stacked
from dnas_ens.evaluate.tables import to_markdown

#: A method whose most expensive option costs less than this share of the budget might do better with more training.
WELL_SPENT = 0.8


def equal_cost(
    results: Sequence[Sequence[Result]], budgets: Mapping[int, Sequence[float]]
) -> tuple[list[dict[str, Any]], str]:
    """Give every method the total cost of ours at several sizes, and compare the results.

    Args:
        budgets: CPU seconds of each of S seeds, by the size of our ensemble that they pay for.

    Returns:
        A row for each size, method and seed, and a table with its sentences for each size, as Markdown.
    """
    rows: list[dict[str, Any]] = []
    text = ""
    for members, seconds in budgets.items():
        of_size, table = at_cost(results, seconds)
        rows += [{"members_of_ours": members, **row} for row in of_size]
        heading = f"### The total cost of ours with {members} members\n\n" if len(budgets) > 1 else ""
        text += ("\n" if text else "") + heading + table
    return rows, text


def at_cost(results: Sequence[Sequence[Result]], budgets: Sequence[float]) -> tuple[list[dict[str, Any]], str]:
    """Give every method one total cost, CPU seconds of each of S seeds; else as `equal_cost`."""
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    losses: dict[str, np.ndarray] = {}
    for index, result in enumerate(results[0]):
        if not result.options:
            continue
        of_seeds = [of_seed[index].options for of_seed in results]
        chosen = [
            option
            for options, budget in zip(of_seeds, budgets, strict=True)
            if (option := best_within(options, budget)) is not None
        ]
        if len(chosen) < len(budgets):
            least = [min(option.cpu_seconds for option in options) for options in of_seeds]
            shown.append(
                {
                    "name": result.name,
                    "members × epochs": "costs more in itself",
                    "cpu_seconds": merged_value("cpu_seconds", least),
                }
            )
            continue
        losses[result.name] = stacked([option.losses for option in chosen])
        rows += [
            {"name": result.name, "budget": budget, **_figures(option)}
            for budget, option in zip(budgets, chosen, strict=True)
        ]
        figures = rows[-len(chosen) :]
        shown.append(
            {
                "name": result.name,
                "members × epochs": ", ".join(dict.fromkeys(option.spent for option in chosen)),
                **{
                    column: merged_value(column, [row[column] for row in figures])
                    for column in ("accuracy", "calibrated_nll", "cpu_seconds")
                },
            }
        )
    text = to_markdown(shown, ("name", "members × epochs", "accuracy", "calibrated_nll", "cpu_seconds"))
    return rows, f"{text}\n{sentences(losses)}{unspent_sentences(results, budgets)}"


def unspent_sentences(results: Sequence[Sequence[Result]], budgets: Sequence[float]) -> str:
    """Name the methods of which nothing was trained that costs about as much as the budget of S seeds."""
    found = []
    for of_method in zip(*results, strict=True):
        shares = [
            max(option.cpu_seconds for option in result.options) / budget
            for result, budget in zip(of_method, budgets, strict=True)
            if result.options
        ]
        if shares and (share := sum(shares) / len(shares)) < WELL_SPENT:
            found.append(
                f"- Of *{of_method[0].name}* nothing was trained that costs more than {100 * share:.0f} % of this; for "
                "all of it there might be better.\n"
            )
    return "".join(found)


def _figures(option: Option) -> dict[str, Any]:
    return {
        "spent": option.spent,
        "members": option.members,
        "epochs": option.epochs,
        "cpu_seconds": option.cpu_seconds,
        "val_nll": option.val_nll,
        "accuracy": float(option.hits.mean()),
        "calibrated_nll": option.calibrated_nll,
    }


def options_table(results: Sequence[Sequence[Result]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return every option of every method and seed: what the frontier is drawn from."""
    return [
        {"name": result.name, "seed": seed, **_figures(option)}
        for of_seed, seed in zip(results, seeds, strict=True)
        for result in of_seed
        for option in result.options
    ]
