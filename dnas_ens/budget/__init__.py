"""A budget of time or epochs, spent where it pays: a valid ensemble after every training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from torch.utils.data import Dataset

    from dnas_ens.data.dataset import ImageData
    from dnas_ens.ensembles import Ensemble


def spend(
    data: str | os.PathLike[str] | Dataset | ImageData = "digits",
    budget: str | int = "10m",
    *,
    folder: str | os.PathLike[str],
    device: str = "auto",
    workers: int = 1,
    **overrides: Any,
) -> Ensemble:
    """Spend a budget on an ensemble, as ``python -m dnas_ens --budget`` does.

    Args:
        data: What ``load_data`` takes.
        budget: A time such as "90s", "30m" or "1h30m", or a number of epochs.
        folder: Holds every network, the ensemble after each of them, and budget.json; a budget that was begun there
            goes on, also with a larger one.
        device: auto, cpu, cuda or cuda:N.
        workers: Networks trained side by side on a CPU, once there is a first one and the time is enough for several;
            0 for one a thread. A script then needs ``if __name__ == "__main__":`` before what it does.
        **overrides: Any field of the training recipe by its own name, such as ``batch_size=128``.

    Returns:
        The ensemble, its temperature fitted on ``val``.

    Raises:
        UserError: If a value or the data do not fit, the budget does not pay for an epoch, or another process has the
            folder.
    """
    from pathlib import Path

    from dnas_ens.budget.amount import Amount, parse_time
    from dnas_ens.budget.cells import StarCells
    from dnas_ens.budget.run import Spending
    from dnas_ens.config import RetrainConfig, require
    from dnas_ens.config.fields import with_fields
    from dnas_ens.config.presets import search_preset
    from dnas_ens.data import load_data
    from dnas_ens.run.folder import held
    from dnas_ens.run.machine import resolve_device

    timed = isinstance(budget, str)
    require(timed or int(budget) > 0, f"The budget is {budget} epochs.", 'Give 1 or more, or a time such as "10m".')
    amount = Amount(total=parse_time(str(budget))) if timed else Amount(total=float(budget), unit="epochs")
    loaded, chosen = load_data(data), resolve_device(device)
    cells = StarCells(search_preset(), loaded, device=chosen)
    recipe = with_fields(RetrainConfig(), **overrides)
    with held(Path(folder)):
        return Spending(
            loaded, recipe, amount=amount, cells=cells, folder=Path(folder), device=chosen, workers=workers
        ).run()
