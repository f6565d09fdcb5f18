import json

import numpy as np
import pytest
import torch
from torch import nn

from dnas_ens.commands.export import main
from dnas_ens.commands.parse import run_main
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.exporting import export
from dnas_ens.errors import UserError

PICTURES = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
IMAGES = torch.from_numpy(PICTURES).permute(0, 3, 1, 2)


def by_hand(ensemble, pictures):
    """Probabilities of the average and of the members, computed apart from the ensemble, in double precision."""
    how = ensemble.preprocessing
    inputs = (pictures / 255 - np.array(how.mean)) / np.array(how.std)
    inputs = torch.from_numpy(inputs).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        members = [member.eval()(inputs).double().softmax(1).numpy() for member in ensemble.members]
    weights = ensemble.weights.double().numpy()
    averaged = sum(weight * probs for weight, probs in zip(weights, members, strict=True))
    tempered = averaged ** (1 / float(ensemble.temperature))
    return tempered / tempered.sum(1, keepdims=True), np.stack(members)


def run_torch(path, pictures):
    files = {"card": ""}
    graph = torch.export.load(path, extra_files=files).module()
    return [output.detach().numpy() for output in graph(torch.from_numpy(pictures))], files["card"]


def run_onnx(path, pictures):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    outputs = session.run(["probabilities", "member_probabilities"], {"pictures": pictures})
    return outputs, session.get_modelmeta().custom_metadata_map["card"]


@pytest.mark.parametrize(("ending", "run"), [("pt2", run_torch), ("onnx", run_onnx)])
def test_a_file_alone_gives_the_ensembles_probabilities_for_any_number_of_pictures(
    ensemble, own_network, tmp_path, ending, run
):
    mixed = Ensemble(
        [ensemble.members[1], own_network(0)],
        weights=[1.0, 3.0],
        temperature=1.7,
        classes=ensemble.classes,
        preprocessing=ensemble.preprocessing,
    )
    if ending == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / "new" / f"ensemble.{ending}"
    assert export(mixed, path, IMAGES[:4]) < 1e-5
    assert mixed.members[0].training
    for count in (1, 2, 9):
        found, card = run(path, PICTURES[:count])
        for exported, expected in zip(found, by_hand(mixed, PICTURES[:count]), strict=True):
            np.testing.assert_allclose(exported, expected, atol=1e-5)
    card = json.loads(card)
    assert card["classes"] == list(mixed.classes)
    assert card["image_size"] == 8


class Branching(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Drawing(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) + torch.rand(images.shape[0], 1) * torch.arange(3)


@pytest.mark.parametrize(
    ("members", "ending", "images", "cause"),
    [
        (None, "bin", IMAGES, "ends neither in .pt2 nor in .onnx"),
        (None, "pt2", IMAGES[:1], "were given to compare on"),
        (None, "pt2", IMAGES.float(), "were given to compare on"),
        ([Branching()], "pt2", IMAGES, "do not become one graph"),
        ([Drawing()], "pt2", IMAGES, "differs from the ensemble"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(ensemble, tmp_path, members, ending, images, cause):
    chosen = Ensemble(members, preprocessing=ensemble.preprocessing) if members else ensemble
    with pytest.raises(UserError, match=cause):
        export(chosen, tmp_path / f"file.{ending}", images)
    assert not list(tmp_path.iterdir())


def test_an_ensemble_without_preprocessing_is_refused(ensemble, tmp_path):
    with pytest.raises(UserError, match="how its members want images"):
        export(Ensemble(list(ensemble.members)), tmp_path / "file.pt2", IMAGES)


def test_the_command_exports_a_saved_ensemble_on_given_pictures(own_ensemble, tmp_path, capsys):
    from PIL import Image

    own_ensemble.save(tmp_path / "saved")
    output = str(tmp_path / "file.pt2")
    assert run_main(main, [str(tmp_path / "saved"), "--output", output]) == 2
    assert "no images to compare" in capsys.readouterr().err
    for index in range(2):
        Image.fromarray(PICTURES[index]).save(tmp_path / f"{index}.png")
    pictures = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    assert run_main(main, [str(tmp_path / "saved"), pictures[0], "--output", output]) == 2
    assert run_main(main, [str(tmp_path / "saved"), *pictures, "--output", output]) == 0
    assert "3 members" in capsys.readouterr().out
    found, _ = run_torch(output, PICTURES)
    np.testing.assert_allclose(found[0], by_hand(own_ensemble, PICTURES)[0], atol=1e-5)
