"""A trunk of a pretrained network: maps against torchvision's own, and the whole way on top of it."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

import dnas_ens as de
from dnas_ens.data import ImageData, Split
from dnas_ens.data.fine_tuning import fine_tuned
from dnas_ens.data.trunk import Trunk, stand_on
from dnas_ens.ensembles import Ensemble
from dnas_ens.errors import UserError
from dnas_ens.run.files import read_json

SIZE = 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of ResNet-18's weights, of seven classes, with BatchNorm statistics as after a training."""
    torch.manual_seed(0)
    network = models.resnet18(num_classes=7)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, SIZE, SIZE))
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(network.state_dict(), path)
    return path, network.eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of 20 photos: stripes of three directions, in noise."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:80, :100]
    for name, phase in (("flat", rows), ("steep", columns), ("slanted", rows + columns)):
        (folder / name).mkdir()
        for number in range(20):
            stripes = 80 * np.sin(0.4 * phase + random.uniform(0, 6))[..., None] + 127
            pixels = np.clip(stripes + random.normal(0, 20, (80, 100, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def on_trunk(weights, photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    return de.load_data(photos, data_root=root, image_size=SIZE, trunk=f"resnet18:{weights[0]}"), root


def test_maps_are_those_of_torchvisions_network_in_8_bits(weights, photos, on_trunk, tmp_path):
    data, _ = on_trunk
    pictures = de.load_data(photos, data_root=tmp_path, image_size=SIZE)
    extractor = create_feature_extractor(weights[1], {"layer3": "maps"})
    normalise = models.ResNet18_Weights.DEFAULT.transforms()
    with torch.no_grad():
        values = (pictures.val.images / 255 - torch.tensor(normalise.mean).view(3, 1, 1)) / torch.tensor(
            normalise.std
        ).view(3, 1, 1)
        expected = extractor(values)["maps"]
    trunk = data.trunk
    assert (trunk.num_channels, trunk.map_size) == (256, 4) == (data.num_channels, data.image_size)
    low, high = trunk.low, trunk.high
    found = low + data.val.images / 255 * (high - low)
    inside = (expected >= low) & (expected <= high)
    assert inside.float().mean() > 0.99
    # Half a level, and rounding.
    assert ((found - expected).abs() <= 0.51 * (high - low) / 255 + 1e-5)[inside].all()
    # Most levels of a channel are used, and few values cut off.
    assert (data.train.images.amax(dim=(0, 2, 3)) == 255).all()
    assert data.splits == pictures.splits
    assert torch.equal(data.val.labels, pictures.val.labels)


def test_maps_are_computed_once_and_belong_to_pictures_and_weights(weights, photos, on_trunk, monkeypatch):
    data, root = on_trunk

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(Trunk, "maps", never)
    again = de.load_data(photos, data_root=root, image_size=SIZE, trunk=f"resnet18:{weights[0]}")
    assert again.fingerprint == data.fingerprint
    assert torch.equal(again.test.images, data.test.images)
    assert torch.equal(again.trunk.high, data.trunk.high)
    with pytest.raises(AssertionError, match="computed again"):
        de.load_data(photos, data_root=root, image_size=SIZE, trunk=f"resnet18:{weights[0]}", trunk_stride=8)
    assert Trunk("resnet18", image_size=SIZE).digest() != data.trunk.digest()


def test_a_network_is_trained_on_the_pictures_before_it_becomes_a_trunk(weights, photos, tmp_path, monkeypatch):
    given = {"data_root": tmp_path, "image_size": SIZE, "trunk": f"resnet18:{weights[0]}"}
    before = de.load_data(photos, **given)
    data = de.load_data(photos, **given, fine_tune_trunk=4)
    assert data.splits == before.splits
    assert data.fingerprint != before.fingerprint
    # All of the network learns: its own answers on val, and its first stages, which the maps are from.
    (file,) = (tmp_path / "maps").glob("*.tuned.safetensors")
    whole = models.resnet18(num_classes=3)
    whole.load_state_dict(load_file(file))
    pictures = de.load_data(photos, data_root=tmp_path, image_size=SIZE)
    values = (pictures.val.images / 255 - data.trunk.mean) / data.trunk.std
    with torch.no_grad():
        answers = whole.eval()(values).argmax(1)
        expected = create_feature_extractor(whole, {"layer3": "maps"})(values)["maps"]
    assert (answers == pictures.val.labels).float().mean() > 0.6
    assert not torch.equal(whole.conv1.weight, weights[1].conv1.weight)
    low, high = data.trunk.low, data.trunk.high
    inside = (expected >= low) & (expected <= high)
    assert inside.float().mean() > 0.9
    found = low + data.val.images / 255 * (high - low)
    assert ((found - expected).abs() <= 0.51 * (high - low) / 255 + 1e-4)[inside].all()
    assert not any(parameter.requires_grad for parameter in data.trunk.parameters())

    # It is trained once, and again where the file is damaged, to the same weights.
    def never(*_, **__):
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr("dnas_ens.data.fine_tuning._train", never)
        assert de.load_data(photos, **given, fine_tune_trunk=4).fingerprint == data.fingerprint
    file.write_bytes(file.read_bytes()[:-100])
    again = de.load_data(photos, **given, fine_tune_trunk=4)
    assert again.fingerprint == data.fingerprint
    assert torch.equal(again.test.images, data.test.images)
    # Other epochs and flips make another.
    for other in ({"fine_tune_trunk": 1}, {"fine_tune_trunk": 4, "flip": not data.flip}):
        assert de.load_data(photos, **given, **other).fingerprint != data.fingerprint


def test_it_is_trained_from_the_given_weights_with_a_new_head(weights, photos, tmp_path, monkeypatch):
    data = de.load_data(photos, data_root=tmp_path, image_size=SIZE)
    # As many classes as there are: the head of others is not taken all the same.
    given, found = {"stride": 16, "image_size": SIZE, "cache": tmp_path}, {}
    save_file(models.resnet18(num_classes=3).state_dict(), tmp_path / "three.safetensors")
    before = load_file(tmp_path / "three.safetensors")
    monkeypatch.setattr(
        "dnas_ens.data.fine_tuning._train", lambda whole, *_, **__: found.update(copy.deepcopy(whole.state_dict()))
    )
    fine_tuned(f"resnet18:{tmp_path / 'three.safetensors'}", data, epochs=1, **given)
    assert found.keys() == before.keys()
    assert {name for name in before if not torch.equal(found[name], before[name])} == {"fc.weight", "fc.bias"}


def test_a_network_whose_modules_have_versions(photos, tmp_path, monkeypatch):
    data = de.load_data(photos, data_root=tmp_path, image_size=SIZE)
    save_file(models.mnasnet0_5().state_dict(), tmp_path / "m.safetensors")
    given = {"epochs": 1, "stride": 16, "image_size": SIZE, "cache": tmp_path}
    monkeypatch.setattr("dnas_ens.data.fine_tuning._train", lambda *_, **__: None)
    first, second = (fine_tuned(f"mnasnet0_5:{tmp_path / 'm.safetensors'}", data, **given) for _ in range(2))
    assert first.digest() == second.digest()


def test_few_grey_pictures_are_enough(weights, tmp_path):
    pixels = torch.randint(256, (12, 1, SIZE, SIZE), dtype=torch.uint8)
    split = Split(images=pixels, labels=torch.arange(12) % 3)
    data = ImageData.from_splits("grey", ("a", "b", "c"), train=split, val=split, test=split, flip=False)
    given = f"resnet18:{weights[0]}"
    trunk = fine_tuned(given, data, epochs=2, stride=16, image_size=SIZE, cache=tmp_path)
    assert trunk(pixels).shape == (12, 256, 4, 4)
    assert not torch.equal(trunk.stages[0].weight, weights[1].conv1.weight)


def test_what_is_trained_further_needs_all_of_its_weights(weights, photos, tmp_path):
    kept = {name: value for name, value in load_file(weights[0]).items() if not name.startswith("layer4.1.bn2")}
    save_file(kept, tmp_path / "part.safetensors")
    given = {"data_root": tmp_path, "image_size": SIZE, "trunk": f"resnet18:{tmp_path / 'part.safetensors'}"}
    assert de.load_data(photos, **given).num_channels == 256
    with pytest.raises(UserError, match=r"layer4\.1\.bn2\.weight is missing"):
        de.load_data(photos, **given, fine_tune_trunk=1)


@pytest.mark.parametrize(("trunk", "epochs"), [(None, 3), ("resnet18", -1), ("resnet18", 0)])
def test_what_cannot_be_trained_before_is_told(photos, trunk, epochs):
    with pytest.raises(UserError, match=f"--fine-tune-trunk is {epochs}"):
        de.load_data(photos, trunk=trunk, fine_tune_trunk=epochs)


@pytest.fixture(scope="module")
def ensemble(on_trunk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "R"
    torch.manual_seed(0)
    return de.spend(on_trunk[0], 24, folder=folder, channels=8, batch_size=16, device="cpu"), folder


def test_an_ensemble_on_a_trunk_takes_pictures(on_trunk, ensemble, photos, tmp_path):
    (data, _), (trained, folder) = on_trunk, ensemble
    # Stripes of three directions are told apart on features that know nothing of them.
    assert trained.evaluate(data.test)["accuracy"] > 0.7
    files = [photos / name / "3.png" for name in data.classes]
    rows, loaded = trained.predict(files), Ensemble.load(folder)
    for row, again in zip(rows, loaded.predict(files), strict=True):
        assert again["label"] == row["label"]
        assert again["probability"] == pytest.approx(row["probability"], abs=1e-6)
        assert again["entropy"] == pytest.approx(row["entropy"], abs=1e-6)
    # From pictures as from their maps.
    pictures = data.pictures
    np.testing.assert_allclose(
        trained.predict_probs(pictures), trained.predict_probs(data.val)[:, : len(pictures)], atol=1e-5
    )
    trained.save(tmp_path / "copy")
    assert read_json(tmp_path / "copy/ensemble.json")["trunk"] == {"name": "resnet18", "stride": 16, "image_size": SIZE}
    assert Ensemble.load(tmp_path / "copy").predict(files) == loaded.predict(files)
    with pytest.raises(UserError, match="32x32, the ensemble's 64 squared"):
        trained.predict_probs(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="have 5 channels"):
        trained.predict_probs(torch.zeros(2, 5, SIZE, SIZE, dtype=torch.uint8))


def test_the_trunk_is_part_of_the_exported_graph(on_trunk, ensemble, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from dnas_ens.ensembles import export

    (data, _), (trained, _) = on_trunk, ensemble
    export(trained, tmp_path / "ours.onnx", data.pictures)
    session = onnxruntime.InferenceSession(str(tmp_path / "ours.onnx"), providers=["CPUExecutionProvider"])
    pictures = data.pictures[:5].permute(0, 2, 3, 1).contiguous().numpy()
    probabilities, _ = session.run(None, {"pictures": pictures})
    expected = trained.combine(torch.from_numpy(trained.predict_probs(data.val)[:, :5])).numpy()
    # A value may round to the next level there.
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("file", "change", "cause"),
    [
        ("trunk.safetensors", None, "missing|No such file"),
        ("trunk.safetensors", b"other", "trunk.safetensors"),
        ("ensemble.json", {"trunk": 5}, "malformed: trunk"),
        ("ensemble.json", {"trunk": {"name": "resnet18", "stride": 16, "image_size": "big"}}, "malformed: trunk"),
        ("ensemble.json", {"trunk": {"name": "resnet99", "stride": 16, "image_size": 64}}, "no classifier 'resnet99'"),
        ("ensemble.json", {"trunk": {"name": "resnet18", "stride": 8, "image_size": 64}}, "does not hold the trunk"),
        ("ensemble.json", {"trunk": {"name": "resnet18", "stride": 16, "image_size": 10**9}}, "no map of pictures"),
        ("ensemble.json", {"trunk_sha256": "0" * 64}, "not the file"),
    ],
)
def test_a_damaged_trunk_is_told(ensemble, tmp_path, file, change, cause):
    ensemble[0].save(tmp_path)
    path = tmp_path / file
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps({**read_json(path), **change}))
    with pytest.raises(UserError, match=cause):
        Ensemble.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "options", "cause"),
    [
        ("resnet99", {}, "no classifier 'resnet99'"),
        ("vit_b_16", {}, "no chain of stages"),
        ("swin_t", {}, "no chain of stages"),
        ("resnet18:none.safetensors", {}, "none.safetensors"),
        ("resnet18", {"stride": 0}, "no map of pictures"),
        ("resnet18", {"stride": 128}, "no map of pictures"),
        ("resnet18", {"stride": 1}, "no stage of stride 1"),
    ],
)
def test_what_cannot_be_a_trunk_is_told(given, options, cause):
    with pytest.raises(UserError, match=cause):
        Trunk.pretrained(given, image_size=SIZE, **options)


def test_weights_of_another_network_are_told(weights):
    with pytest.raises(UserError, match=r"no weights of resnet34: layer1\.2\.conv1\.weight is missing"):
        Trunk.pretrained(f"resnet34:{weights[0]}", image_size=SIZE)


@pytest.mark.parametrize(
    ("name", "stride", "shape"),
    [
        ("resnet18", 8, (128, 8)),
        ("resnet18", 32, (512, 2)),
        ("efficientnet_b0", 16, (112, 4)),
        ("convnext_tiny", 16, (384, 4)),
        ("mobilenet_v3_small", 16, (48, 4)),
        ("regnet_y_400mf", 16, (208, 4)),
        ("vgg11", 16, (512, 4)),
        ("shufflenet_v2_x0_5", 16, (96, 4)),
    ],
)
def test_the_deepest_stage_of_a_stride_is_found(name, stride, shape):
    trunk = Trunk(name, stride=stride, image_size=SIZE)
    assert (trunk.num_channels, trunk.map_size) == shape
    assert trunk(torch.zeros(2, 1, SIZE, SIZE, dtype=torch.uint8)).shape == (2, shape[0], shape[1], shape[1])
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert not trunk.train().training


def test_ranges_are_of_training_pictures_alone(weights, photos, tmp_path):
    pictures = de.load_data(photos, data_root=tmp_path, image_size=SIZE)
    black = pictures.test.images * 0
    changed = replace(pictures, test=type(pictures.test)(black, pictures.test.labels), deep_colour=True)
    one, other = (Trunk.pretrained(f"resnet18:{weights[0]}", image_size=SIZE) for _ in range(2))
    first, second = stand_on(pictures, one, cache=tmp_path / "1"), stand_on(changed, other, cache=tmp_path / "2")
    assert torch.equal(one.high, other.high)
    assert second.deep_colour
    assert torch.equal(first.train.images, second.train.images)
    assert not torch.equal(first.test.images, second.test.images)


def test_a_dry_run_computes_no_maps_of_what_will_be_trained_further(weights, photos, tmp_path, monkeypatch, capsys):
    from dnas_ens.commands.options import load_configured_data
    from dnas_ens.config import DataConfig

    where = {"data": str(photos), "data_root": tmp_path, "image_size": SIZE, "trunk": f"resnet18:{weights[0]}"}
    monkeypatch.setattr(Trunk, "maps", None)
    data = load_configured_data(DataConfig(**where, fine_tune_trunk=2), dry_run=True)
    assert data.train.images.shape == (36, 256, 4, 4)
    assert data.train.images.float().std() > 60  # so that no training on it diverges
    assert not (tmp_path / "maps").exists()
    assert "not in the estimate: 2 epochs" in capsys.readouterr().err


def test_the_command_line_stands_on_a_trunk(weights, photos, tmp_path, monkeypatch, capsys):
    from dnas_ens.commands import evaluate, predict, retrain, search
    from dnas_ens.commands.parse import run_main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(weights[0].read_bytes())
    tiny = (
        "--num-cells 1 --channels 4 --num-nodes 2 --directions 2 --epochs 2 --warmup-epochs 1 --batch-size 16 "
        "--drawn-members 2 --penalty-draws 2 --members 2 --pool-size 4 --device cpu --run-dir R"
    )
    data = f"--data {photos} --data-root {tmp_path} --image-size {SIZE} --trunk resnet18:weights.safetensors"
    assert run_main(search.main, [*tiny.split(), *data.split()]) == 0
    # From another folder.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = "../R --epochs 1 --channels 4 --num-cells 1 --batch-size 16 --device cpu --workers 1"
    assert run_main(retrain.main, recipe.split()) == 0
    assert run_main(evaluate.main, ["../R", "--device", "cpu"]) == 0
    assert run_main(evaluate.main, ["../R", "--device", "cpu", "--shift"]) == 2
    assert "maps of a trunk" in capsys.readouterr().err
    assert run_main(predict.main, ["../R", str(photos / "flat/0.png"), "--device", "cpu"]) == 0
    assert "flat/0.png" in capsys.readouterr().out
