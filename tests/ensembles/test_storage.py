"""Saving and loading: what was saved comes back bit-equal, and what was tampered with does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dnas_ens.ensembles.ensemble import Ensemble, load
from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network

MakeMembers = Callable[..., Sequence[nn.Module]]


def test_save_and_load_external_members(
    ensemble: Ensemble, tmp_path: Path, mixed_members: MakeMembers
) -> None:
    ensemble.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", members=mixed_members(seed=9))
    pixels = torch.randint(256, (11, 3, 8, 8), dtype=torch.uint8)
    np.testing.assert_array_equal(loaded.predict_probs(pixels), ensemble.predict_probs(pixels))
    images = torch.randn(11, 3, 8, 8)
    assert torch.equal(loaded(images), ensemble.eval()(images))
    assert (loaded.classes, loaded.preprocessing) == (ensemble.classes, ensemble.preprocessing)
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("weights", [None, [12.0, 4.0, 19.0], [1e-5, 7.0, 3.0]])
def test_own_members_are_rebuilt(
    weights: list[float] | None, tmp_path: Path, own_network: Callable[[int], Network]
) -> None:
    ensemble = Ensemble([own_network(seed) for seed in range(3)], weights=weights, temperature=0.9)
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path)
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(images), ensemble.eval()(images))
    assert torch.equal(loaded.weights, ensemble.weights)
    assert loaded.preprocessing is None
    saved = json.loads((tmp_path / "ensemble.json").read_text())
    assert [entry["file"] for entry in saved["members"]] == [
        f"members/{i}/model.safetensors" for i in range(3)
    ]
    assert saved["members"][1]["spec"] == ensemble.members[1].spec()  # type: ignore[operator]


def test_own_and_external_members_together(
    tmp_path: Path, small_network: Callable[..., nn.Module], own_network: Callable[[int], Network]
) -> None:
    ensemble = Ensemble([own_network(0), small_network()])
    ensemble.save(tmp_path)
    images = torch.randn(5, 3, 8, 8)
    expected = ensemble.eval()(images)
    assert torch.equal(load(tmp_path, members=[small_network()])(images), expected)
    assert torch.equal(load(tmp_path, members=[own_network(7), small_network()])(images), expected)


def test_what_members_return_is_saved(
    tmp_path: Path, small_network: Callable[..., nn.Module], own_network: Callable[[int], Network]
) -> None:
    def with_softmax() -> nn.Module:
        return nn.Sequential(small_network(), nn.Softmax(1))

    images = torch.randn(5, 3, 8, 8)
    ensemble = Ensemble(
        [with_softmax(), own_network(0), with_softmax()], outputs=["probs", None, None]
    ).eval()
    assert ensemble.outputs == ["probs", "logits", None]
    with pytest.warns(UserWarning, match="Member 2 returns class probabilities"):
        expected = ensemble(images)
    ensemble.save(tmp_path)
    # Without a warning: what was found is known.
    loaded = load(tmp_path, members=[with_softmax(), with_softmax()])
    assert loaded.outputs == ["probs", "logits", "probs"]
    assert torch.equal(loaded(images), expected)


def test_a_hand_written_manifest_loads(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path)
    saved = json.loads((tmp_path / "ensemble.json").read_text())
    members = [{"file": entry["file"], "spec": entry["spec"]} for entry in saved["members"]]
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": members}))
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(load(tmp_path)(images), own_ensemble.eval()(images))


def test_an_earlier_ensemble_is_not_overwritten_unasked(
    own_ensemble: Ensemble, tmp_path: Path, own_network: Callable[[int], Network]
) -> None:
    own_ensemble.save(tmp_path)
    before = (tmp_path / "ensemble.json").read_bytes()
    other = Ensemble([own_network(8)])
    with pytest.raises(UserError, match="already"):
        other.save(tmp_path)
    assert (tmp_path / "ensemble.json").read_bytes() == before
    other.save(tmp_path, overwrite=True)
    assert load(tmp_path).num_members == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: [], "members"),
        (lambda saved: {**saved, "members": None}, "members"),
        (lambda saved: {**saved, "members": []}, "no members"),
        (lambda saved: {**saved, "members": [{"file": 3, "spec": {}}]}, "members"),
        (lambda saved: {**saved, "weights": [1.0]}, "weights"),
        (lambda saved: {**saved, "weights": "equal"}, "weights"),
        (lambda saved: {**saved, "weights": [0.0, 0.0, 0.0]}, "weights"),
        (lambda saved: {**saved, "temperature": "hot"}, "temperature"),
        (lambda saved: {**saved, "temperature": -1}, "temperature"),
        (lambda saved: {**saved, "classes": [1, 2, 3]}, "classes"),
        (lambda saved: {**saved, "outputs": "probs"}, "outputs"),
        (lambda saved: {**saved, "outputs": ["logits"]}, "outputs"),
        (lambda saved: {**saved, "outputs": ["logits", 3, None]}, "outputs"),
        (lambda saved: {**saved, "std": [0.2]}, "preprocessing"),
        (lambda saved: {**saved, "std": [0.2, 0.2, "0.2"]}, "preprocessing"),
        (lambda saved: {**saved, "mean": None}, "preprocessing"),
    ],
)
def test_a_malformed_manifest_is_refused(
    own_ensemble: Ensemble, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    own_ensemble.save(tmp_path)
    manifest = tmp_path / "ensemble.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_cells": "three"},
        {"channels": None},
        {"genotype": {}},
        {"genotype": None},
        {"kind": "other"},
        {"x": 1},
    ],
)
def test_a_malformed_spec_is_refused(own_ensemble: Ensemble, tmp_path: Path, change: dict[str, Any]) -> None:
    own_ensemble.save(tmp_path)
    manifest = tmp_path / "ensemble.json"
    saved = json.loads(manifest.read_text())
    saved["members"][1]["spec"] |= change
    manifest.write_text(json.dumps(saved))
    with pytest.raises(UserError):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"members": NaN}', "\x00"])
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(UserError, match=r"ensemble\.json"):
        load(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no ensemble\.json"):
        load(tmp_path / "absent")


def test_files_outside_the_folder_are_refused(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path / "other")
    own_ensemble.save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "ensemble.json"
    saved = json.loads(manifest.read_text())
    outside = tmp_path / "other" / "members/0/model.safetensors"
    (tmp_path / "saved" / "link").symlink_to(outside)
    for file in (str(outside), "../other/members/0/model.safetensors", "link", "a\x00b"):
        saved["members"][0]["file"] = file
        manifest.write_text(json.dumps(saved))
        with pytest.raises(UserError, match="outside the folder"):
            load(tmp_path / "saved")


def test_a_damaged_member_is_refused(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path)
    path = tmp_path / "members/1/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load(tmp_path)


def test_a_damaged_member_without_a_checksum_is_refused(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path)
    manifest = tmp_path / "ensemble.json"
    saved = json.loads(manifest.read_text())
    del saved["members"][1]["sha256"]
    manifest.write_text(json.dumps(saved))
    path = tmp_path / "members/1/model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(tmp_path)


def test_modules_that_do_not_fit_are_refused(
    ensemble: Ensemble, tmp_path: Path, mixed_members: MakeMembers, small_network: Callable[..., nn.Module]
) -> None:
    ensemble.save(tmp_path)
    with pytest.raises(UserError, match="2 of them external; 0 were given"):
        load(tmp_path)
    with pytest.raises(UserError, match="1 were given"):
        load(tmp_path, members=[small_network()])
    with pytest.raises(UserError, match="does not fit"):
        load(tmp_path, members=mixed_members()[::-1])
    with pytest.raises(UserError, match="does not fit"):
        load(tmp_path, members=[mixed_members()[0], small_network(4)])


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 10**400},
        {"temperature": -1},
        {"temperature": 0},
        {"weights": [10**400, 1, 1]},
        {"file": "\ud800"},
        {"file": "a" * 5000},
        {"file": "members/\x00"},
        {"spec": {"num_cells": 0}},
        {"spec": {"num_cells": 10**7}},
        {"spec": {"num_cells": -3}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_hostile_manifests_are_refused_at_once(
    change: dict[str, Any], tmp_path: Path, own_network: Callable[[int], Network]
) -> None:
    Ensemble([own_network(seed) for seed in range(3)]).save(tmp_path)
    manifest = json.loads((tmp_path / "ensemble.json").read_text())
    member = manifest["members"][0]
    member["spec"].update(change.pop("spec", {}))
    member.update({"file": change.pop("file")} if "file" in change else {})
    manifest.update(change)
    (tmp_path / "ensemble.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        load(tmp_path)
