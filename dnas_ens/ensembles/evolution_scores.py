"""Scores of the candidates of an evolution, kept in a file so that none is evaluated twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnas_ens.errors import UserError
from dnas_ens.run.files import read_json, unreadable, write_json
from dnas_ens.types import FloatArray

#: Coefficients that agree in so many decimals are one candidate, so that a start that scipy scaled back and
#: forth is itself again.
DECIMALS = 12
#: New scores after which the file is written; a score takes far longer than that.
SAVE_EVERY = 10


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


class Scores:
    """Candidates by their coefficients; those of the file need no evaluation.

    Args:
        judge: Returns NLL in nats and accuracy in [0, 1] of coefficients (G, k).
        header: What scores depend on; a file with another one is refused.
        file: JSON file; None for none.

    Raises:
        UserError: A file that is damaged or belongs to another evolution.
    """

    def __init__(
        self,
        judge: Callable[[FloatArray], tuple[float, float]],
        header: dict[str, Any],
        *,
        file: Path | None,
    ) -> None:
        self._judge, self._header, self._file = judge, header, file
        self._known: dict[bytes, Candidate] = {}
        self._unsaved = 0
        if file is not None and file.exists():
            self._read(file)

    def candidate(self, coefficients: FloatArray) -> Candidate:
        """Return the candidate of coefficients (G, k), judged unless it is known."""
        coefficients = np.round(coefficients, DECIMALS) + 0.0  # no -0
        key = coefficients.tobytes()
        if key not in self._known:
            val_nll, val_accuracy = self._judge(coefficients)
            self._known[key] = Candidate(
                coefficients=coefficients, val_nll=val_nll, val_accuracy=val_accuracy
            )
            self._unsaved += 1
            if self._unsaved >= SAVE_EVERY:
                self.save()
        return self._known[key]

    def save(self) -> None:
        """Write the file if there is anything new."""
        if self._file is None or not self._unsaved:
            return
        entries = [
            {**vars(each), "coefficients": each.coefficients.tolist()} for each in self._known.values()
        ]
        write_json(self._file, {"scores_of": self._header, "candidates": entries})
        self._unsaved = 0

    def _read(self, file: Path) -> None:
        content = read_json(file)
        try:
            found = content["scores_of"]
            for entry in content["candidates"]:
                coefficients = np.array(entry["coefficients"], dtype=np.float64)
                self._known[coefficients.tobytes()] = Candidate(
                    coefficients=coefficients,
                    val_nll=float(entry["val_nll"]),
                    val_accuracy=float(entry["val_accuracy"]),
                )
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(file, f"it is not the file of an evolution ({error!r})") from error
        if found != self._header:
            raise UserError(
                f"{file} holds scores of other networks or data: {found} instead of {self._header}.",
                "Name another file, or delete this one to start again.",
            )
