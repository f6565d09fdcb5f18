"""Results by class: recall, precision, confusions, and what a constant answer would get.

Legend: N test images, K classes. Classes that no test image belongs to have no recall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import to_markdown
from dnas_ens.metrics.scores import balanced_accuracy
from dnas_ens.types import IntArray

#: Rows of the table; of more classes it shows the ones of lowest recall.
MAX_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class: its name, and how many test images are of it, are answered with it, and are both."""

    name: str
    num_images: int
    num_answers: int
    num_right: int

    @property
    def recall(self) -> float:
        """Share of its images that are right, in [0, 1]; NaN where it has none."""
        return self.num_right / self.num_images if self.num_images else math.nan

    @property
    def precision(self) -> float:
        """Share of the answers with it that are right, in [0, 1]; NaN where there are none."""
        return self.num_right / self.num_answers if self.num_answers else math.nan


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """The ensemble's answers on the test images, by class.

    Args:
        rows: One a class, in order.
        confusion: (K, K) counts; row: the true class, column: the answer.
        accuracy: Share of images right, in [0, 1].
        balanced_accuracy: Mean recall of the classes that occur, in [0, 1].
    """

    rows: tuple[ClassRow, ...]
    confusion: IntArray
    accuracy: float
    balanced_accuracy: float

    @classmethod
    def of(cls, predictions: Predictions) -> ClassFigures:
        """Count the answers of the averaged probabilities."""
        mean, labels = predictions.averaged()[1], predictions.test_labels
        num_classes = mean.shape[1]
        cells = labels * num_classes + mean.argmax(axis=1)
        confusion = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
        right = confusion.diagonal()
        rows = tuple(
            ClassRow(
                name=str(name),
                num_images=int(confusion[index].sum()),
                num_answers=int(confusion[:, index].sum()),
                num_right=int(right[index]),
            )
            for index, name in enumerate(predictions.classes)
        )
        return cls(
            rows=rows,
            confusion=confusion,
            accuracy=float(right.sum() / len(labels)),
            balanced_accuracy=balanced_accuracy.of(mean, labels),
        )

    @property
    def majority(self) -> ClassRow:
        """The most frequent class of the test images."""
        return max(self.rows, key=lambda row: row.num_images)

    @property
    def majority_accuracy(self) -> float:
        """What always answering the majority class gets, in [0, 1]."""
        return self.majority.num_images / int(self.confusion.sum())

    @property
    def shown(self) -> list[ClassRow]:
        """The rows of the table: all, or the ones of lowest recall."""
        if len(self.rows) <= MAX_SHOWN:
            return list(self.rows)
        occurring = [row for row in self.rows if row.num_images]
        return sorted(occurring, key=lambda row: row.recall)[:MAX_SHOWN]

    def sentences(self) -> list[str]:
        """Balanced accuracy beside what a constant answer gets, with a warning where the ensemble is no better."""
        said = [
            f"Balanced accuracy of the ensemble, the mean recall per class: {_percent(self.balanced_accuracy)} %. "
            f"Always answering {self.majority.name!r}, the majority class of the test images, is right for "
            f"{_percent(self.majority_accuracy)} %."
        ]
        if self.accuracy <= self.majority_accuracy:
            said.append(
                f"Warning: with {_percent(self.accuracy)} % right the ensemble is no better than that constant answer."
            )
        return said

    def to_markdown(self) -> str:
        """Return the sentences and a table of the classes."""
        of = "" if len(self.rows) <= MAX_SHOWN else f", the {MAX_SHOWN} of lowest recall of {len(self.rows)}"
        table = [
            {
                "class": row.name,
                "test images": row.num_images,
                "recall %": _percent(row.recall),
                "precision %": _percent(row.precision),
            }
            for row in self.shown
        ]
        return "\n".join([*self.sentences(), "", f"Ensemble per class{of}:", "", to_markdown(table, list(table[0]))])


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"
