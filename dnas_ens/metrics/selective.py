"""Selective prediction: how accurate a classifier is on the images that it is surest of.

A classifier that may abstain answers the most confident share of the images, its coverage; its risk is the share of
errors among them. The better confidence tells right answers from wrong ones, the faster risk falls with coverage.

Images of equal confidence have no order. Their errors are spread evenly over them, which is the mean over all
orders that they could come in, so that nothing depends on the order of the images. Legend: N images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dnas_ens.types import FloatArray

#: Coverage in exact arithmetic is a whole number of images; this much above it is rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class RiskCoverage:
    """The risk-coverage curve of a classifier (Geifman and El-Yaniv, arXiv 1705.08500).

    Args:
        coverage: Share of the images that are answered, shape (N,), 1/N to 1 in steps of 1/N.
        risk: Share of errors among them, shape (N,), range [0, 1]; the last is the error rate.
    """

    coverage: FloatArray
    risk: FloatArray

    @classmethod
    def of(cls, confidence: FloatArray, errors: npt.NDArray[np.bool_]) -> RiskCoverage:
        """Make the curve of answers with a confidence, any finite numbers, shape (N,), each right or an error."""
        # Images and errors at every distinct confidence, the highest first.
        _, group = np.unique(-confidence, return_inverse=True)
        images_until = np.cumsum(np.bincount(group))
        errors_until = np.cumsum(np.bincount(group, weights=errors))
        answered = np.arange(1, len(errors) + 1)
        expected = np.interp(answered, [0, *images_until], [0.0, *errors_until])
        return cls(coverage=answered / len(errors), risk=expected / answered)

    @property
    def aurc(self) -> float:
        """Area under the curve, 1/N sum_n risk_n, in [0, 1]; the smaller the better (arXiv 1805.08206).

        It falls with the error rate too: 0 without errors, and the error rate itself where all answers are equally
        sure.
        """
        return float(self.risk.mean())

    def accuracy_at(self, coverage: float) -> float:
        """Accuracy, in [0, 1], on the fewest images that make up at least a coverage; ValueError outside (0, 1]."""
        if not 0.0 < coverage <= 1.0:
            raise ValueError(f"coverage must lie in (0, 1], got {coverage}")
        answered = max(1, int(np.ceil(coverage * len(self.risk) - _ROUNDING)))
        return float(1.0 - self.risk[answered - 1])
