"""The rows of one training on test, predicted once after everything was chosen on val."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies.predictors import Row, measured_rows
from studies.weight_averaging.choice import choose
from studies.weight_averaging.options import Study, Task
from studies.weight_averaging.problem import Problem


def evaluate(study: Study, problem: Problem, task: Task, place: Path) -> None:
    """Choose on val, then predict test once; write predictions.npz and, last, record.json."""
    from dnas_ens.metrics.scores import accuracy, nll
    from dnas_ens.run.files import read_json, write_json
    from dnas_ens.training.prediction import predict_batches

    chosen, curves = choose(study, problem, task, place)
    trained = read_json(place / "training.json")
    probs: dict[str, list[np.ndarray]] = {}
    labels: dict[str, np.ndarray] = {}
    for split, batches in (("val", problem.val), ("test", problem.test)):
        known: dict[int, np.ndarray] = {}
        for choice in chosen.values():
            for model in choice.models:
                # A model of several rows predicts once.
                if id(model) not in known:
                    known[id(model)], labels[split] = predict_batches(model, batches)
        probs[split] = [
            np.mean([known[id(model)] for model in choice.models], axis=0) for choice in chosen.values()
        ]
    rows = []
    for index, (name, choice) in enumerate(chosen.items()):
        of_branches = trained["branches_cpu_seconds"] if choice.branched else 0.0
        val_probs = probs["val"][index].astype(np.float32)
        details: dict[str, Any] = {
            "num_averaged": choice.num_averaged,
            "passes": len(choice.models),
            "training_cpu_seconds": trained["training_cpu_seconds"] + of_branches,
            "choosing_cpu_seconds": choice.choosing_cpu_seconds,
            **choice.notes,
            "val_nll": nll(val_probs, labels["val"]),
            "val_accuracy": accuracy(val_probs, labels["val"]),
        }
        rows.append(Row(name=name, val_probs=val_probs, test_probs=probs["test"][index], details=details))
    measured = measured_rows(place, rows, val_labels=labels["val"], test_labels=labels["test"])
    record = {
        **task._asdict(),
        **trained,
        "sizes": problem.sizes,
        "rows": {row.pop("name"): row for row in measured},
        "curves": curves,
    }
    write_json(place / "record.json", record)
