"""Which run folders may be compared as search seeds of one configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnas_ens.run.folder import RunFolder


def require_alike(runs: Sequence[RunFolder]) -> None:
    """Check that runs are trained, and differ in their seeds alone.

    Raises:
        UserError: Members are missing, seeds are the same, or something else differs; its field is named.
    """
    from dnas_ens.errors import UserError
    from dnas_ens.run.files import first_difference

    first = runs[0]
    seen: dict[int, Path] = {}
    for run in runs:
        if not run.file("ensemble.json").exists():
            raise UserError(
                f"The members of {run.path} are not trained.", f"Run python -m dnas_ens.retrain {run.path}."
            )
        difference = first_difference(_without_seeds(first), _without_seeds(run), "config")
        if difference is not None:
            field, there, here = difference
            raise UserError(
                f"{first.path} and {run.path} are no seeds of one configuration: {field} is {there} in the first and "
                f"{here} in the second.",
                "Compare them one by one, or name runs that differ in their seeds alone.",
            )
        sizes = [members_of(each) for each in (first, run)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{first.path} has {sizes[0]} members and {run.path} has {sizes[1]}.",
                "Train as many of each: python -m dnas_ens.retrain RUN --members N --resume.",
            )
        prints = [each.read_json("splits.json")["fingerprint"] for each in (first, run)]
        if prints[0] != prints[1]:
            raise UserError(
                f"{first.path} and {run.path} have other images or splits.", "Name runs on the same data."
            )
        other = seen.setdefault(run.config["search"]["seed"], run.path)
        if other != run.path:
            raise UserError(
                f"{other} and {run.path} have the same search seed.", "Name runs with seeds of their own."
            )


def members_of(run: RunFolder) -> int:
    """Return the number of members of a run's ensemble."""
    return len(run.read_json("ensemble.json")["members"])


def _without_seeds(run: RunFolder) -> dict[str, Any]:
    """Return a configuration without seeds, and without the file of a given base, which a seed may have of its own."""
    search, recipe = dict(run.config["search"]), dict(run.config["retrain"])
    search["hypernetwork"] = {
        **search["hypernetwork"],
        "base": search["hypernetwork"]["base"] is not None,
    }
    del search["seed"], recipe["seed"]
    return {"search": search, "retrain": recipe}
