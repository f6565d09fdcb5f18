"""What a run folder holds, read once; a part that is absent is None or empty."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from dnas_ens.errors import UserError
from dnas_ens.evaluate.classes import ClassFigures
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.run import stored_predictions
from dnas_ens.evaluate.tables import best_single, result_rows
from dnas_ens.metrics.calibration import fit_temperature, tempered
from dnas_ens.metrics.ensemble_size import ensemble_size_curve
from dnas_ens.run.files import read_checked, unreadable
from dnas_ens.space.genotype import Genotype, ranked_genotypes
from dnas_ens.types import FloatArray

#: Forms of the files, as far as the report reads them.
_NUMBER, _MAYBE = (int, float), (int, float, NoneType)
CONFIG = {"search?": {"preset?": str, "data?": {"data?": str}}}
FOUND = {
    "selected": [int],
    "ranking?": ([int], NoneType),
    "candidates": [
        {
            "genotype": dict,
            **dict.fromkeys(("lam?", "distance_to_base?", "supernet_val_nll?", "expected_step_ms?"), _MAYBE),
            **dict.fromkeys(("direction?", "shared_edges?"), (int, NoneType)),
        }
    ],
    "curve?": (
        {
            "lam": [_NUMBER],
            "distance_to_base": [_NUMBER],
            **dict.fromkeys(("shared_edges?", "direction?"), ([int], NoneType)),
        },
        NoneType,
    ),
    "report?": ({"cpu_seconds?": _MAYBE, "gpu_seconds?": _MAYBE}, NoneType),
}
MEMBER = {
    "parameters": int,
    "val_accuracy?": _MAYBE,
    "val_nll?": _MAYBE,
    "cpu_seconds?": _MAYBE,
    "gpu_seconds?": _MAYBE,
}
ENSEMBLE = {"members": [{"spec?": (dict, NoneType)}], "num_trained?": int}
BUDGET = {
    "budget": {"total": _NUMBER, "unit": str},
    "channels": int,
    "done": [
        {
            "unit": {"kind": str, "number": int, "cell": int},
            "epochs": int,
            "cost": _NUMBER,
            "at": _NUMBER,
            "loss": _NUMBER,
            "alone": _NUMBER,
            "members": [int],
        }
    ],
}
ROWS = [
    {
        "name": str,
        **dict.fromkeys(("accuracy", "nll", "calibrated_nll", "brier", "ece15"), _NUMBER),
        "temperature?": _MAYBE,
        "parameters?": (int, NoneType),
    }
]
SIZES = [
    {
        "size": int,
        **dict.fromkeys(("accuracy", "calibrated_nll"), _NUMBER),
        **dict.fromkeys(("accuracy_deviation", "calibrated_nll_deviation"), _MAYBE),
    }
]
COMPARED = [{"name": str, "accuracy": _MAYBE, "calibrated_nll": _MAYBE}]
COMPARISON = {"rows": COMPARED, "source?": str}
SHIFT = {
    "source?": str,
    "corruptions?": [{"corruption": str, "severity": int, "row": str, "accuracy": _MAYBE, "calibrated_nll": _MAYBE}],
    "out_of_distribution?": [{"name": str, "row": str, "num_images": int, "auroc_entropy": _MAYBE}],
}


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The content of a run folder: config.json, ensemble.json, budget.json and rows of comparison.json as they are.

    Args:
        environment: env.json, an entry a command.
        found: genotypes.json.
        members: Each member's member.json, in order.
        discarded: Those of the networks that were trained for the ensemble and not chosen.
        predictions: predictions.npz; ``averaged``, ``best`` and ``classes`` are there where it is.
        rows: results.json, or the same computed from the predictions.
        ensemble_sizes: ensemble_size.json, or the same computed from the predictions.
        corruptions: Rows of shift.json on corrupted test images.
        out_of_distribution: Rows of shift.json on images of other data.
    """

    folder: Path
    config: Mapping[str, Any]
    environment: Sequence[Mapping[str, Any]] = ()
    found: Mapping[str, Any] | None = None
    members: Sequence[Mapping[str, Any]] = ()
    discarded: Sequence[Mapping[str, Any]] = ()
    ensemble: Mapping[str, Any] | None = None
    budget: Mapping[str, Any] | None = None
    predictions: Predictions | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    ensemble_sizes: Sequence[Mapping[str, Any]] = ()
    comparison: Sequence[Mapping[str, Any]] = ()
    corruptions: Sequence[Mapping[str, Any]] = ()
    out_of_distribution: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def load(cls, folder: str | Path) -> RunFiles:
        """Read a run folder.

        Raises:
            UserError: It is not a run folder, a file in it is damaged, or its ensemble has changed since it was
                evaluated.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is not a run folder: it has no config.json.",
                "Name a folder that a search has made, such as runs/001-digits.",
            )
        predictions = None
        if (folder / "predictions.npz").is_file():
            predictions = stored_predictions(folder)
        shift = _of_this_ensemble(folder / "shift.json", SHIFT, predictions, again="evaluate", option=" --shift")
        compared = _of_this_ensemble(folder / "comparison.json", COMPARISON, predictions, again="compare")
        ensemble = _optional(folder / "ensemble.json", ENSEMBLE, None)
        members, discarded = _networks(folder, ensemble)
        return cls(
            folder=folder,
            config=read_checked(folder / "config.json", CONFIG),
            environment=_optional(folder / "env.json", [dict], []),
            found=_found(folder / "genotypes.json"),
            members=members,
            discarded=discarded,
            ensemble=ensemble,
            budget=_optional(folder / "budget.json", BUDGET, None),
            predictions=predictions,
            rows=_rows(folder / "results.json", predictions),
            ensemble_sizes=_sizes(folder / "ensemble_size.json", predictions),
            comparison=compared.get("rows", []),
            corruptions=shift.get("corruptions", []),
            out_of_distribution=shift.get("out_of_distribution", []),
        )

    @cached_property
    def averaged(self) -> FloatArray:
        """The ensemble's class probabilities on the test images, (N, K)."""
        assert self.predictions is not None
        return self.predictions.averaged()[1]

    @cached_property
    def stated(self) -> FloatArray:
        """What the ensemble states, as ``predict`` does: the average after the temperature fitted on val, (N, K)."""
        assert self.predictions is not None
        val = self.predictions.averaged()[0]
        return tempered(self.averaged, fit_temperature.of(val, self.predictions.val_labels))

    @cached_property
    def best(self) -> int:
        """The best single member."""
        assert self.predictions is not None
        return best_single(self.predictions)

    @cached_property
    def classes(self) -> ClassFigures:
        """How each class fares."""
        assert self.predictions is not None
        return ClassFigures.of(self.predictions)

    @property
    def whole(self) -> str:
        """What predicts: "ensemble", or "network" where there is one."""
        return "ensemble" if self.num_members > 1 else "network"

    @property
    def data(self) -> Mapping[str, Any]:
        """Description of the data in the latest environment; empty where none is noted."""
        described = [entry["data"] for entry in self.environment if isinstance(entry.get("data"), dict)]
        return described[-1] if described else {}

    @property
    def data_name(self) -> str:
        """The data set's name, of a path its last part."""
        name = self.data.get("name") or self.config.get("search", {}).get("data", {}).get("data", "")
        return Path(str(name)).name or "unnamed data"

    @property
    def num_members(self) -> int:
        """Number of members, as far as the run has come."""
        if self.predictions is not None:
            return len(self.predictions.test_probs)
        return len(self.members) or len((self.found or {}).get("selected", []))

    @property
    def genotypes(self) -> list[Genotype]:
        """Genotypes of the ensemble's networks, or of the search's choice if there is no ensemble yet."""
        specs = [member.get("spec") or {} for member in (self.ensemble or {}).get("members", [])]
        stored = [spec["genotype"] for spec in specs if "genotype" in spec]
        if not stored and self.found is not None:
            return ranked_genotypes(self.found)
        return [Genotype.from_dict(genotype) for genotype in stored]

    def seconds(self) -> tuple[float, float, str] | None:
        """Seconds of the search and of the members' training, and of what: "GPU" or "CPU"; None where unknown."""
        report = (self.found or {}).get("report") or {}
        if not self.members or "cpu_seconds" not in report:
            return None
        networks = [*self.members, *self.discarded]
        on_gpu = sum(float(each.get("gpu_seconds") or 0.0) for each in (report, *networks))
        kind = "gpu" if on_gpu else "cpu"
        key = f"{kind}_seconds"
        training = [float(each[key]) for each in networks if each.get(key) is not None]
        if len(training) < len(networks):
            return None
        return float(report.get(key) or 0.0), sum(training), kind.upper()


def _optional(path: Path, form: object, default: Any) -> Any:
    return read_checked(path, form) if path.is_file() else default


def _of_this_ensemble(
    path: Path, form: object, predictions: Predictions | None, *, again: str, option: str = ""
) -> dict[str, Any]:
    """Return what a file holds, nothing where it is not there, or of an earlier ensemble than the predictions."""
    found: dict[str, Any] = _optional(path, form, {})
    source = found.get("source")
    if predictions is None or not (source and predictions.source) or source == predictions.source:
        return found
    command = f"python -m dnas_ens.{again} {shlex.quote(str(path.parent))}{option}"
    print(f"without {path.name}, which is of an earlier ensemble: run {command} again", file=sys.stderr)
    return {}


def _found(path: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = _optional(path, FOUND, None)
    curve = (found or {}).get("curve") or {}
    names = ("lam", "distance_to_base", "shared_edges", "direction")
    if len({len(curve[name]) for name in names if curve.get(name) is not None}) > 1:
        raise unreadable(path, "the columns of its curve differ in length")
    return found


def _networks(folder: Path, ensemble: Mapping[str, Any] | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return member.json of each member, and of each network that was trained and not chosen."""
    paths = {int(path.parent.name): path for path in folder.glob("members/*/member.json") if path.parent.name.isdigit()}
    chosen = sorted(paths)
    if ensemble is not None:
        numbers = [Path(str(member.get("file"))).parent.name for member in ensemble["members"]]
        chosen = [int(number) for number in numbers if number.isdigit() and int(number) in paths]
        # Others are of an ensemble that was larger.
        trained = range(ensemble.get("num_trained") or 0)
        paths = {number: path for number, path in paths.items() if number in chosen or number in trained}
    notes = {number: read_checked(path, MEMBER) for number, path in sorted(paths.items())}
    return [notes[number] for number in chosen], [note for number, note in notes.items() if number not in chosen]


def _rows(path: Path, predictions: Predictions | None) -> list[dict[str, Any]]:
    """Results as they were written; computed again if they are missing or belong to other predictions."""
    if predictions is None:
        return []
    rows: list[dict[str, Any]] = _optional(path, ROWS, [])
    # A row a member, then best single, average member and ensemble. Their number alone may be that of fewer members and
    # of a distilled network.
    members = [f"member {index}" for index in range(predictions.num_members)]
    theirs = [row["name"] for row in rows[:-3]] == members
    return rows if theirs else result_rows(predictions)


def _sizes(path: Path, predictions: Predictions | None) -> list[dict[str, Any]]:
    """Metrics against ensemble size as they were written; computed again if they are missing."""
    if predictions is None:
        return []
    rows: list[dict[str, Any]] = _optional(path, SIZES, [])
    if len(rows) == predictions.num_members:
        return rows
    return ensemble_size_curve(
        predictions.val_probs, predictions.val_labels, predictions.test_probs, predictions.test_labels
    )
