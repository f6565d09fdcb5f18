"""What ``predict --coverage`` and ``predict --cascade`` come to on test images, fitted on val."""

from __future__ import annotations

import numpy as np

from dnas_ens.ensembles.cascade import cascaded, fit_cascade
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.metrics.calibration import fit_temperature, tempered
from dnas_ens.metrics.conformal import conformal_threshold, prediction_sets

#: Coverage that is reported.
COVERAGE = 0.9


def decisions(predictions: Predictions) -> dict[str, float]:
    """Return what sets and cascade come to.

    Returns:
        ``set_coverage``, the share of test images whose set of `COVERAGE` holds the right class; ``set_size``, its mean
        number of classes; ``cascade_members``, members asked for a test image on average by the cascade that loses
        nothing on val; ``cascade_accuracy``.
    """
    val, test = predictions.averaged()
    labels, images = predictions.test_labels, np.arange(len(predictions.test_labels))
    temperature = fit_temperature.of(val, predictions.val_labels)
    threshold = conformal_threshold(tempered(val, temperature), predictions.val_labels, COVERAGE)
    sets = prediction_sets(tempered(test, temperature), threshold)
    cascade = fit_cascade(predictions.val_probs, predictions.val_labels, weights=predictions.weights)
    averaged, asked = cascaded(predictions.test_probs, np.asarray(predictions.weights), cascade.threshold)
    return {
        "set_coverage": float(sets[images, labels].mean()),
        "set_size": float(sets.sum(axis=1).mean()),
        "cascade_members": float(asked.mean()),
        "cascade_accuracy": float((averaged.argmax(axis=1) == labels).mean()),
    }


def decisions_markdown(found: dict[str, float], *, num_members: int, accuracy: float) -> str:
    """Return the two sentences of results.md."""
    sets = (
        f"Sets of classes for {100 * COVERAGE:.0f} % coverage (`predict --coverage {COVERAGE}`) hold "
        f"{found['set_size']:.2f} classes on average, and the right one for {100 * found['set_coverage']:.2f} % of the "
        "test images.\n"
    )
    if num_members == 1:
        return sets
    right, right_of_all = 100 * found["cascade_accuracy"], 100 * accuracy
    return sets + (
        f"\nA cascade (`predict --cascade`) asks {found['cascade_members']:.2f} of {num_members} members for an image "
        f"on average and is right for {right:.2f} %, all members for {right_of_all:.2f} %.\n"
    )
