"""What an ensemble says of an image, in words and figures a person reads.

Legend: M members, N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dnas_ens.metrics.calibration import apply_temperature
from dnas_ens.metrics.diversity import entropy, mutual_information
from dnas_ens.types import FloatArray


def labelled(
    paths: Sequence[str | Path],
    probs: npt.NDArray[np.float32],
    *,
    shares: FloatArray,
    temperature: float,
    classes: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Return a row for every image; see `dnas_ens.ensembles.ensemble.Ensemble.predict`.

    Args:
        paths: N image files.
        probs: The members' probabilities (M, N, K), in [0, 1].
        shares: Combining weights (M,), with sum 1.
        temperature: T.
        classes: K names; None where they are unknown.
    """
    averaged = np.tensordot(shares, probs.astype(np.float64), axes=1)
    tempered = apply_temperature(averaged, temperature)
    labels = tempered.argmax(axis=1)
    columns = zip(
        paths,
        labels,
        tempered.max(axis=1),
        entropy(tempered),
        mutual_information(probs, shares),
        (probs.argmax(axis=2) == labels).sum(axis=0),
        strict=True,
    )
    return [
        {
            "path": str(path),
            "label": str(label) if classes is None else classes[label],
            "probability": float(probability),
            "entropy": float(uncertainty),
            "mutual_information": float(information),
            "votes": int(votes),
        }
        for path, label, probability, uncertainty, information, votes in columns
    ]
