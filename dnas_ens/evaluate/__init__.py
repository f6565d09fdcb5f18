"""Evaluation: the one place that reads the test images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnas_ens.data.dataset import ImageData
    from dnas_ens.ensembles import Ensemble


def evaluate(ensemble: Ensemble, data: ImageData, *, device: str = "auto") -> dict[str, Any]:
    """Measure an ensemble, its members and its best single member on the test images.

    Args:
        data: Images; temperatures are fitted on ``val``, figures are measured on ``test``.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        ``rows``, a list of dictionaries (members, best single, average member, ensemble), see
        ``dnas_ens.evaluate.tables.result_rows``.

    Raises:
        UserError: Other data than a whole data set.
    """
    from dnas_ens.data.dataset import ImageData
    from dnas_ens.errors import UserError
    from dnas_ens.evaluate.predictions import predict_splits
    from dnas_ens.evaluate.tables import result_rows
    from dnas_ens.run.machine import resolve_device

    if not isinstance(data, ImageData):
        raise UserError(
            f"A {type(data).__name__} was given where a data set with its val and test images is wanted.",
            "Give what load_data returns; of a DataLoader or a Split ensemble.evaluate(...) measures the images.",
        )
    return {"rows": result_rows(predict_splits(ensemble, data, device=resolve_device(device)))}
