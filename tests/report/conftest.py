"""Run folders made of small files of the real form."""

import numpy as np
import pytest
import tiny

from dnas_ens.evaluate.run import write_tables
from dnas_ens.evaluate.tables import ensemble_row, result_rows
from dnas_ens.run.files import write_json
from dnas_ens.space.genotype import random_genotype

OPERATIONS = ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")


@pytest.fixture
def predictions():
    def make(num_members, num_images, num_classes, *, sharpness=2.5):
        parameters = [1000 + index for index in range(num_members)]
        return tiny.predictions(num_members, num_images, num_classes, sharpness=sharpness, parameters=parameters)

    return make


@pytest.fixture
def make_run(tmp_path):
    """A run folder with everything that search, retrain and evaluate leave, comparison and shift where asked for."""

    def make(predictions, *, data="tiles", channels=1, comparison=False, shift=False, evaluated=True):
        folder = tmp_path / "run"
        members = len(predictions.test_probs)
        rng = np.random.default_rng(1)
        kinds = {"operations": OPERATIONS, "num_nodes": 2, "cell_types": ("normal", "reduction")}
        genotypes = [random_genotype(rng, edges_per_node=2, **kinds) for _ in range(members)]
        described = {
            "name": data,
            "classes": list(predictions.classes),
            "num_classes": len(predictions.classes),
            "image_size": 8,
            "num_channels": channels,
            "fingerprint": "0123456789abcdef",
            "splits": {"test": {"num_images": len(predictions.test_labels)}},
        }
        write_json(folder / "config.json", {"search": {"preset": "smoke", "seed": 3, "data": {"data": data}}})
        write_json(folder / "env.json", [{"command": ["python", "-m", "dnas_ens"], "data": described}])
        found = {
            "selected": list(range(members)),
            "ranking": list(range(members)),
            "candidates": [
                {"genotype": each.to_dict(), "lam": 0.25 * index, "direction": index, "distance_to_base": 0.2}
                for index, each in enumerate(genotypes)
            ],
            "curve": {
                "lam": [0.0, 0.5],
                "distance_to_base": [0.0, 0.4],
                "shared_edges": [8, 5],
                "direction": [0, 0],
            },
            "report": {"cpu_seconds": 12.0, "wall_seconds": 10.0},
        }
        write_json(folder / "genotypes.json", found)
        if not evaluated:
            return folder
        specs = [{"spec": {"kind": "network", "genotype": each.to_dict()}} for each in genotypes]
        write_json(folder / "ensemble.json", {"classes": list(predictions.classes), "members": specs})
        for index in range(members):
            member = {"parameters": 1000 + index, "val_accuracy": 0.9, "val_nll": 0.3, "cpu_seconds": 5.0}
            write_json(folder / f"members/{index}/member.json", member)
        predictions.save(folder / "predictions.npz")
        write_tables(folder, result_rows(predictions))
        if comparison:
            ours = ensemble_row("ours (searched ensemble)", predictions)
            ours |= {"networks": members, "cpu_seconds": 27.0}
            loss = ours["calibrated_nll"] / 2
            other = {**ours, "name": "a <rival> & co", "calibrated_nll": loss, "cpu_seconds": 54.0}
            dear = {"name": "dear", "accuracy": 0.5, "calibrated_nll": 9.0, "cpu_seconds": 60.0}
            rows = [ours, {**other, "interval": [0.01, 0.9]}, dear]
            write_json(folder / "comparison.json", {"rows": rows})
        if shift:
            corruptions = [
                {
                    "corruption": name,
                    "severity": severity,
                    "row": row,
                    "accuracy": 0.9 - 0.1 * severity,
                    "nll": severity / 2,
                    "calibrated_nll": severity / 3,
                    "ece15": 0.1,
                }
                for name in "fog gaussian_noise $snow$ blur jpeg cifar10-c/fog cifar10-c/frost".split()
                for severity in range(1, 6)
                for row in ("ensemble", "average member", "best single")
            ]
            others = [
                {
                    "name": "noise",
                    "row": row,
                    "num_images": 9,
                    "auroc_entropy": entropy,
                    "auroc_mutual_information": information,
                }
                for row, entropy, information in (("ensemble", 0.8, 0.7), ("best single", 0.6, None))
            ]
            write_json(folder / "shift.json", {"corruptions": corruptions, "out_of_distribution": others})
        return folder

    return make
