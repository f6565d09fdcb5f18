"""Saving and loading: what was saved comes back bit-equal, and what was tampered with does not."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from dnas_ens.ensembles.ensemble import Ensemble, load
from dnas_ens.errors import UserError
from dnas_ens.run.files import read_json

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_save_and_load_external_members(ensemble, tmp_path, mixed_members, small_network):
    ensemble.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", members=mixed_members(seed=9))
    pixels = torch.randint(256, (11, 3, 8, 8), dtype=torch.uint8)
    np.testing.assert_array_equal(loaded.predict_probs(pixels), ensemble.predict_probs(pixels))
    assert torch.equal(loaded(IMAGES), ensemble.eval()(IMAGES))
    assert (loaded.classes, loaded.preprocessing) == (ensemble.classes, ensemble.preprocessing)
    assert not any(module.training for module in loaded.modules())
    large, small = mixed_members()
    for members, cause in (
        (None, "2 of them external; 0 were given"),
        ([small], "1 were given"),
        ([small, large], "does not fit"),
        ([large, small_network(4)], "does not fit"),
    ):
        with pytest.raises(UserError, match=cause):
            load(tmp_path / "saved", members=members)


@pytest.mark.parametrize("weights", [None, [1e-5, 7.0, 3.0]])
def test_own_members_are_rebuilt(weights, tmp_path, own_network):
    ensemble = Ensemble([own_network(seed) for seed in range(3)], weights=weights, temperature=0.9)
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path)
    assert torch.equal(loaded(IMAGES), ensemble.eval()(IMAGES))
    assert torch.equal(loaded.weights, ensemble.weights)
    assert loaded.preprocessing is None
    saved = read_json(tmp_path / "ensemble.json")
    assert [entry["file"] for entry in saved["members"]] == [f"members/{i}/model.safetensors" for i in range(3)]
    assert saved["members"][1]["spec"] == ensemble.members[1].spec()
    # A hand-written manifest loads too.
    members = [{"file": entry["file"], "spec": entry["spec"]} for entry in saved["members"]]
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": members}))
    assert torch.equal(load(tmp_path)(IMAGES), Ensemble(ensemble.members).eval()(IMAGES))


def test_the_card_says_what_is_in_the_folder(tmp_path, small_network, own_network):
    from dnas_ens.ensembles.preprocessing import Preprocessing

    grey = Preprocessing(image_size=8, num_channels=1, mean=(0.5,), std=(0.2,))
    members = [own_network(0), own_network(1)]
    ensemble = Ensemble(members, weights=[3, 1], temperature=1.25, classes=["cat", "dog"], preprocessing=grey)
    ensemble.save(tmp_path / "own", notes="## Data\n\nPictures of our own cat.")
    card = (tmp_path / "own/MODEL_CARD.md").read_text()
    for said in (
        "2 networks",
        "short side becomes 8 pixels",
        "grey",
        "2 classes (cat, dog)",
        "T = 1.25",
        "## Data\n\nPictures of our own cat.",
        "`members/0/model.safetensors` | Network | ",
        "| 0.750 |",
        str(members[0].genotype),
        'de.load("FOLDER")\n',
    ):
        assert said in card
    Ensemble([small_network(), own_network(0)]).save(tmp_path / "mixed")
    card = (tmp_path / "mixed/MODEL_CARD.md").read_text()
    assert "members=[...])  # fresh ones for your 1 own" in card
    assert "no names here" in card


def test_own_and_external_members_together_with_what_they_return(tmp_path, small_network, own_network):
    def with_softmax():
        return nn.Sequential(small_network(), nn.Softmax(1))

    ensemble = Ensemble([with_softmax(), own_network(0), with_softmax()], outputs=["probs", None, None]).eval()
    assert ensemble.outputs == ["probs", "logits", None]
    with pytest.warns(UserWarning, match="Member 2 returns class probabilities"):
        expected = ensemble(IMAGES)
    ensemble.save(tmp_path)
    # Without a warning: what was found is known.
    for members in ([with_softmax(), with_softmax()], [with_softmax(), own_network(7), with_softmax()]):
        loaded = load(tmp_path, members=members)
        assert loaded.outputs == ["probs", "logits", "probs"]
        assert torch.equal(loaded(IMAGES), expected)


def test_an_earlier_ensemble_is_not_overwritten_unasked(own_ensemble, tmp_path, own_network):
    own_ensemble.save(tmp_path)
    before = (tmp_path / "ensemble.json").read_bytes()
    other = Ensemble([own_network(8)])
    with pytest.raises(UserError, match="already"):
        other.save(tmp_path)
    assert (tmp_path / "ensemble.json").read_bytes() == before
    # Nor by one that cannot be saved whole.
    strange = nn.Sequential(nn.Flatten(), Noted(192, 3))
    with pytest.raises(UserError, match="keeps something in"):
        Ensemble([own_network(8), strange]).save(tmp_path, overwrite=True)
    assert load(tmp_path).num_members == own_ensemble.num_members
    assert not list(tmp_path.rglob("*.tmp"))
    other.save(tmp_path, overwrite=True)
    assert load(tmp_path).num_members == 1


class Scaled(nn.Module):
    """A network with a constant that is not part of its state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5), persistent=False)

    def forward(self, images):
        return self.layers(images - self.mean)


def test_constants_that_no_file_holds_take_the_precision_of_the_rest(tmp_path):
    images, saved = torch.randn(4, 3, 8, 8), Ensemble([Scaled().bfloat16()])
    saved.save(tmp_path)
    loaded = load(tmp_path, members=[Scaled()])
    assert loaded.members[0].mean.dtype == torch.bfloat16
    assert torch.equal(loaded(images), saved(images))


class Noted(nn.Linear):
    def get_extra_state(self):
        return {"epoch": 3}


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"Member 0 keeps something in 1\._extra_state"):
        Ensemble([nn.Sequential(nn.Flatten(), Noted(192, 3))]).save(tmp_path)


def changed(folder, **fields):
    """Load a folder after a change of its manifest: of fields, or of those of member 1 and of its spec."""
    manifest = folder / "ensemble.json"
    saved = read_json(manifest)
    entry = saved["members"][1]
    entry |= fields.pop("member", {})
    entry["spec"] |= fields.pop("spec", {})
    manifest.write_text(json.dumps({**saved, **fields}))
    return load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": None}, "members"),
        ({"members": []}, "no members"),
        ({"members": [{"file": 3, "spec": {}}]}, "members"),
        ({"weights": [1.0]}, "weights"),
        ({"weights": "equal"}, "weights"),
        ({"weights": [10**400, 1, 1]}, "weights"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"classes": [1, 2, 3]}, "classes"),
        ({"outputs": "probs"}, "outputs"),
        ({"outputs": ["logits", 3, None]}, "outputs"),
        ({"mean": None}, "preprocessing"),
        *(({"spec": {"num_cells": value}}, None) for value in ("three", 0, 10**7)),
        *(({"spec": spec}, None) for spec in ({"channels": None}, {"genotype": {}}, {"kind": "other"}, {"x": 1})),
        *(({"member": {"file": file}}, "cannot be one") for file in ("\ud800", "a" * 5000)),
        *(({"member": {"file": file}}, "outside the folder") for file in ("members/\x00", "../a", "/etc/passwd")),
    ],
)
def test_a_manifest_that_is_malformed_or_hostile_is_refused(own_ensemble, tmp_path, change, message):
    own_ensemble.save(tmp_path)
    with pytest.raises(UserError, match=message):
        changed(tmp_path, **change)


@pytest.mark.parametrize("text", ["{", "[[]]", '{"members": NaN}', "\x00", None])
def test_a_manifest_that_is_absent_or_no_json_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(UserError, match=r"ensemble\.json"):
        load(tmp_path)


def test_a_link_out_of_the_folder_is_refused(own_ensemble, tmp_path):
    own_ensemble.save(tmp_path / "other")
    own_ensemble.save(tmp_path / "saved")
    outside = tmp_path / "other" / "members/0/model.safetensors"
    (tmp_path / "saved" / "link").symlink_to(outside)
    for file in (str(outside), "../other/members/0/model.safetensors", "link"):
        with pytest.raises(UserError, match="outside the folder"):
            changed(tmp_path / "saved", member={"file": file})


def test_a_damaged_member_is_refused(own_ensemble, tmp_path):
    own_ensemble.save(tmp_path)
    path = tmp_path / "members/1/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="SHA-256"):
        load(tmp_path)
    path.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        changed(tmp_path, member={"sha256": None})
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load(tmp_path)
