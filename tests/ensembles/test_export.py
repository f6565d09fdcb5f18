import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import genotype, stack
from torch import nn

from dnas_ens.commands.export import main
from dnas_ens.commands.parse import run_main
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.exporting import export
from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network

PICTURES = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
IMAGES = torch.from_numpy(PICTURES).permute(0, 3, 1, 2)


def with_members(ensemble, *members):
    known = {"classes": ensemble.classes, "preprocessing": ensemble.preprocessing}
    return Ensemble(members, weights=[1.0, 3.0], temperature=1.7, **known)


def check(ensemble, run, card):
    """Compare with probabilities computed apart from the ensemble, in double precision."""
    how = ensemble.preprocessing
    for count in (1, 2, 9):
        inputs = (PICTURES[:count] / 255 - np.array(how.mean)) / np.array(how.std)
        inputs = torch.from_numpy(inputs).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            members = np.stack([member.eval()(inputs).double().softmax(1).numpy() for member in ensemble.members])
        tempered = np.tensordot([0.25, 0.75], members, axes=1) ** (1 / 1.7)
        probs, member_probs = run(PICTURES[:count])
        np.testing.assert_allclose(probs, tempered / tempered.sum(1, keepdims=True), atol=1e-5)
        np.testing.assert_allclose(member_probs, members, atol=1e-5)
    card = json.loads(card)
    assert (card["classes"], card["image_size"]) == (list(ensemble.classes), 8)


def test_an_onnx_file_alone_gives_the_ensembles_probabilities(ensemble, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    mixed = with_members(ensemble, ensemble.members[1], Network(genotype(), stack(1, in_channels=3)))
    path = tmp_path / "new" / "ensemble.onnx"
    assert export(mixed, path, IMAGES[:4]) < 1e-5
    assert mixed.members[0].training
    session, names = runtime.InferenceSession(path), ["probabilities", "member_probabilities"]
    card = session.get_modelmeta().custom_metadata_map["card"]
    check(mixed, lambda pictures: session.run(names, {"pictures": pictures}), card)


def test_the_command_exports_a_saved_ensemble_on_given_pictures(ensemble, tmp_path, capsys):
    own = with_members(ensemble, *(Network(genotype(seed), stack(1, in_channels=3)) for seed in range(2)))
    own.save(tmp_path / "saved")
    output = str(tmp_path / "file.pt2")
    pictures = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    for path, picture in zip(pictures, PICTURES, strict=False):
        Image.fromarray(picture).save(path)
    for given, code in (([], 2), (pictures[:1], 2), (pictures, 0)):
        assert run_main(main, [str(tmp_path / "saved"), *given, "-o", output]) == code
    out, err = capsys.readouterr()
    assert "no images to compare" in err
    assert "2 members" in out
    files = {"card": ""}
    graph = torch.export.load(output, extra_files=files).module()
    check(own, lambda pictures: [found.detach().numpy() for found in graph(torch.from_numpy(pictures))], files["card"])


class Branching(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Drawing(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) + torch.rand(images.shape[0], 1) * torch.arange(3)


@pytest.mark.parametrize(
    ("member", "ending", "images", "cause"),
    [
        (Branching(), "bin", IMAGES, "ends neither in .pt2 nor in .onnx"),
        (Branching(), "pt2", IMAGES[:1], "were given to compare on"),
        (Branching(), "pt2", IMAGES.float(), "were given to compare on"),
        (Branching(), "pt2", IMAGES, "do not become one graph"),
        (Drawing(), "pt2", IMAGES, "differs from the ensemble"),
        (None, "pt2", IMAGES, "how its members want images"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(ensemble, tmp_path, member, ending, images, cause):
    chosen = Ensemble([member], preprocessing=ensemble.preprocessing) if member else Ensemble([Drawing()])
    with pytest.raises(UserError, match=cause):
        export(chosen, tmp_path / f"file.{ending}", images)
    with pytest.raises(UserError, match="format is 'pt2'"):
        export(chosen, tmp_path / f"file.{ending}", images, format="pt2")
    assert not list(tmp_path.iterdir())
