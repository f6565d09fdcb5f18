"""budget.json: what a budget was spent on, and what is in progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from dnas_ens.budget.amount import Amount
from dnas_ens.budget.forecast import NAMES, Done, Unit
from dnas_ens.errors import UserError
from dnas_ens.run.files import first_difference, read_checked, unreadable, write_json

LEDGER = "budget.json"
_NUMBER = (int, float)
_UNIT = {
    "kind": str,
    "number": int,
    "cell": int,
    "parent": (int, NoneType),
    "epochs": int,
    "learning_rate": _NUMBER,
}
_DONE = {
    "unit": _UNIT,
    "epochs": int,
    "cost": _NUMBER,
    "train_loss": (*_NUMBER, NoneType),
    "alone": _NUMBER,
    "loss": _NUMBER,
    "members": [int],
    "alone_error": _NUMBER,
    "error": _NUMBER,
    "at": _NUMBER,
    "slots": int,
}


@dataclass(kw_only=True)
class Ledger:
    """What a budget has been spent on, as budget.json holds it.

    Args:
        recipe: How networks are trained, as it was given.
        channels: C of all networks.
        first_epochs: Length of the first training.
        first_cell: Position of its genotype among the cells.
        epoch_seconds: Of the base cell, measured before it began.
        done: Finished units, in the order in which they ended.
        coming: The units in progress.
        spent: Of the budget.
    """

    recipe: Mapping[str, Any]
    channels: int
    first_epochs: int
    first_cell: int
    epoch_seconds: float
    done: list[Done]
    coming: list[Unit]
    spent: float = 0.0

    def write(self, path: Path, amount: Amount) -> None:
        """Write it, with what the budget is."""
        write_json(
            path,
            {
                "budget": vars(amount),
                **vars(self),
                "done": [done.to_dict() for done in self.done],
                "coming": [vars(unit) for unit in self.coming],
            },
        )

    @classmethod
    def read(cls, path: Path, amount: Amount, recipe: Mapping[str, Any]) -> Ledger:
        """Read what `write` wrote; UserError if it was a budget of the other unit, or of another recipe."""
        form = {
            "budget": {"unit": str},
            "recipe?": dict,
            "channels": int,
            "first_epochs": int,
            "first_cell": int,
            "epoch_seconds": float,
            "done": [_DONE],
            "coming": [_UNIT],
            "spent": (int, float),
        }
        found: dict[str, Any] = read_checked(path, form)
        units = [done["unit"] for done in found["done"]] + found["coming"]
        ended: list[int | None] = [None]
        for position, unit in enumerate(units):
            fits = unit["kind"] in NAMES and unit["parent"] in ended and unit["cell"] >= 0 and unit["epochs"] >= 1
            if not fits:
                raise unreadable(path, f"unit {unit['number']} cannot be a part of a budget")
            if position < len(found["done"]):
                ended.append(unit["number"])
        if sorted(unit["number"] for unit in units) != list(range(len(units))):
            raise unreadable(path, "the numbers of its units are not those from 0 on")
        if not all(done["epochs"] >= 1 and done["slots"] >= 1 for done in found["done"]):
            raise unreadable(path, "a unit in it has no epochs")
        if found["budget"]["unit"] != amount.unit:
            raise UserError(
                f"{path} holds a budget of {found['budget']['unit']}, and one of {amount.unit} was given.",
                "Go on with the same kind: --budget for a time, --budget-epochs for epochs.",
            )
        if (difference := first_difference(found.get("recipe", recipe), recipe, "recipe")) is not None:
            field, there, here = difference
            raise UserError(
                f"{path} holds networks of another recipe: {field} is {there} there and {here} here.",
                f"Give {field} the value it has there, or spend the budget in another folder.",
            )
        return cls(
            recipe=recipe,
            channels=found["channels"],
            first_epochs=found["first_epochs"],
            first_cell=found["first_cell"],
            epoch_seconds=found["epoch_seconds"],
            done=[Done.from_dict(entry) for entry in found["done"]],
            coming=[Unit.from_dict(entry) for entry in found["coming"]],
            spent=found["spent"],
        )
