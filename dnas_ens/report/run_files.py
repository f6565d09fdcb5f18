"""What a run folder holds, read once; a part that is absent is None or empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnas_ens.analysis.ensemble_size import ensemble_size_curve
from dnas_ens.errors import UserError
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import result_rows
from dnas_ens.files import read_json, unreadable
from dnas_ens.genotype import Genotype, ranked_genotypes

#: The rows of a comparison are sorted into the report by these.
COMPARISON_FIELDS = ("name", "accuracy", "calibrated_nll")
CORRUPTION_FIELDS = ("corruption", "severity", "row", "accuracy", "calibrated_nll")
SIZE_FIELDS = ("size", "accuracy", "accuracy_deviation", "calibrated_nll", "calibrated_nll_deviation")
OUT_OF_DISTRIBUTION_FIELDS = ("name", "row", "num_images", "auroc_entropy")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The content of a run folder.

    Args:
        folder: Where it lies.
        config: config.json.
        environment: env.json, an entry a command.
        found: genotypes.json.
        members: Each member's member.json, in order.
        ensemble: ensemble.json.
        predictions: predictions.npz.
        rows: results.json, or the same computed from the predictions.
        ensemble_sizes: ensemble_size.json, or the same computed from the predictions.
        comparison: Rows of comparison.json.
        corruptions: Rows of shift.json on corrupted test images.
        out_of_distribution: Rows of shift.json on images of other data.
    """

    folder: Path
    config: Mapping[str, Any]
    environment: Sequence[Mapping[str, Any]] = ()
    found: Mapping[str, Any] | None = None
    members: Sequence[Mapping[str, Any]] = ()
    ensemble: Mapping[str, Any] | None = None
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
            UserError: It is not a run folder, or a file in it is damaged.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is not a run folder: it has no config.json.",
                "Name a folder that a search has made, such as runs/001-digits.",
            )
        predictions = None
        if (folder / "predictions.npz").is_file():
            predictions = Predictions.load(folder / "predictions.npz")
        shift = _optional(folder / "shift.json", {})
        return cls(
            folder=folder,
            config=read_json(folder / "config.json"),
            environment=_optional(folder / "env.json", []),
            found=_optional(folder / "genotypes.json", None),
            members=_members(folder),
            ensemble=_optional(folder / "ensemble.json", None),
            predictions=predictions,
            rows=_rows(folder / "results.json", predictions),
            ensemble_sizes=_sizes(folder / "ensemble_size.json", predictions),
            comparison=_table(
                _compared(folder / "comparison.json"), COMPARISON_FIELDS, folder / "comparison.json"
            ),
            corruptions=_table(shift.get("corruptions", []), CORRUPTION_FIELDS, folder / "shift.json"),
            out_of_distribution=_table(
                shift.get("out_of_distribution", []), OUT_OF_DISTRIBUTION_FIELDS, folder / "shift.json"
            ),
        )

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
        """Genotypes of the ensemble's networks, of the searched ones where there is no ensemble yet."""
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
        on_gpu = sum(float(each.get("gpu_seconds") or 0.0) for each in (report, *self.members))
        kind = "gpu" if on_gpu else "cpu"
        key = f"{kind}_seconds"
        training = [float(each[key]) for each in self.members if each.get(key) is not None]
        if len(training) < len(self.members):
            return None
        return float(report.get(key) or 0.0), sum(training), kind.upper()


def _optional(path: Path, default: Any) -> Any:
    return read_json(path) if path.is_file() else default


def _compared(path: Path) -> Any:
    """Rows of a comparison, which also holds what each method gets for other costs."""
    content = _optional(path, {"rows": []})
    return content.get("rows") if isinstance(content, dict) else content


def _members(folder: Path) -> list[dict[str, Any]]:
    paths = [path for path in folder.glob("members/*/member.json") if path.parent.name.isdigit()]
    return [read_json(path) for path in sorted(paths, key=lambda path: int(path.parent.name))]


def _rows(path: Path, predictions: Predictions | None) -> list[dict[str, Any]]:
    """Results as they were written, made anew where they are missing or belong to other predictions."""
    if predictions is None:
        return []
    rows = _optional(path, [])
    # A row a member, then best single, average member and ensemble.
    return rows if len(rows) == len(predictions.test_probs) + 3 else result_rows(predictions)


def _sizes(path: Path, predictions: Predictions | None) -> list[dict[str, Any]]:
    """Metrics against ensemble size as they were written, made anew where they are missing."""
    if predictions is None:
        return []
    rows = _optional(path, [])
    if len(rows) == predictions.num_members:
        return _table(rows, SIZE_FIELDS, path)
    return ensemble_size_curve(
        predictions.val_probs, predictions.val_labels, predictions.test_probs, predictions.test_labels
    ).to_rows()


def _table(rows: Any, fields: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Check that every row has the fields a report needs."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise unreadable(path, "it does not hold rows")
    for row in rows:
        if missing := [name for name in fields if name not in row]:
            raise unreadable(path, f"a row lacks {missing[0]}")
    return rows
