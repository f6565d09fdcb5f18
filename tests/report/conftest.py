import pytest
import tiny

from dnas_ens.evaluate.run import write_tables
from dnas_ens.evaluate.tables import ensemble_row, result_rows
from dnas_ens.run.files import write_json


@pytest.fixture
def predictions():
    def make(members, images, classes, *, sharpness=2.5):
        return tiny.predictions(members, images, classes, sharpness=sharpness, parameters=[1000] * members)

    return make


@pytest.fixture
def make_run(tmp_path):
    """A run folder with everything that search, retrain and evaluate leave, comparison and shift where asked for."""

    def make(predictions, *, data="tiles", channels=1, comparison=False, shift=False, evaluated=True):
        folder = tmp_path / "run"
        members = len(predictions.test_probs)
        genotypes = [tiny.genotype(seed, cell_types=("normal", "reduction")) for seed in range(members)]
        classes = list(predictions.classes)
        described = {"name": data, "classes": classes, "num_classes": len(classes), "fingerprint": "0123456789abcdef"}
        described |= {"image_size": 8, "num_channels": channels}
        described["splits"] = {"test": {"num_images": len(predictions.test_labels)}}
        write_json(folder / "config.json", {"search": {"preset": "smoke", "seed": 3, "data": {"data": data}}})
        write_json(folder / "env.json", [{"command": ["python", "-m", "dnas_ens"], "data": described}])
        found = {
            "selected": list(range(members)),
            "ranking": list(range(members)),
            "candidates": [
                {"genotype": each.to_dict(), "lam": 0.25 * index, "direction": index, "distance_to_base": 0.2}
                for index, each in enumerate(genotypes)
            ],
            "curve": {"lam": [0.0, 0.5], "distance_to_base": [0.0, 0.4], "shared_edges": [8, 5], "direction": [0, 0]},
            "report": {"cpu_seconds": 12.0, "wall_seconds": 10.0},
        }
        write_json(folder / "genotypes.json", found)
        if not evaluated:
            return folder
        specs = [
            {"file": f"members/{index}/model.safetensors", "spec": {"kind": "network", "genotype": each.to_dict()}}
            for index, each in enumerate(genotypes)
        ]
        write_json(folder / "ensemble.json", {"classes": classes, "members": specs})
        for index in range(members):
            member = {"parameters": 1000, "val_accuracy": 0.9, "val_nll": 0.3, "cpu_seconds": 5.0}
            write_json(folder / f"members/{index}/member.json", member)
        predictions.save(folder / "predictions.npz")
        write_tables(folder, result_rows(predictions))
        if comparison:
            ours = {**ensemble_row("ours (searched ensemble)", predictions), "networks": members, "cpu_seconds": 27.0}
            other = {"name": "a <rival> & co", "calibrated_nll": ours["calibrated_nll"] / 2, "cpu_seconds": 54.0}
            dear = {"name": "dear", "accuracy": 0.5, "calibrated_nll": 9.0, "cpu_seconds": 60.0}
            write_json(folder / "comparison.json", {"rows": [ours, {**ours, **other, "interval": [0.01, 0.9]}, dear]})
        if shift:
            figures = {"accuracy": 0.5, "nll": 1.0, "calibrated_nll": 0.7, "ece15": 0.1}
            corruptions = [
                {"corruption": name, "severity": severity, "row": row, **figures}
                for name in "fog gaussian_noise $snow$ blur jpeg cifar10-c/fog cifar10-c/frost".split()
                for severity in range(1, 6)
                for row in ("ensemble", "average member", "best single")
            ]
            noise = {"name": "noise", "num_images": 9, "auroc_entropy": 0.8, "auroc_mutual_information": None}
            others = [{**noise, "row": "ensemble", "auroc_mutual_information": 0.7}, {**noise, "row": "best single"}]
            write_json(folder / "shift.json", {"corruptions": corruptions, "out_of_distribution": others})
        return folder

    return make
