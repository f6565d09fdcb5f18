"""Reference models: parameter counts by hand and as published, shapes, names, saving."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.errors import UserError
from dnas_ens.nn.reference_models import REFERENCE_MODELS, model_from_spec, reference_model
from dnas_ens.nn.reference_models.densenet import DenseNet
from dnas_ens.nn.reference_models.residual_networks import ResNet, ResNetBlock, WideBlock, WideResNet
from dnas_ens.nn.reference_models.small_networks import MLP, PlainCNN

#: Those that are small enough to run in a test.
LIGHT = [name for name in REFERENCE_MODELS if name not in ("wrn-28-8", "wrn-28-10", "densenet-100-24")]


def wide_resnet_by_hand(depth: int, widening: int, num_classes: int = 10) -> int:
    """3x3 convolutions have 9 a b weights, BatchNorm 2 a, projections a b, the classifier (a + 1) K."""
    total, before = 9 * 3 * 16, 16
    for width in (16 * widening, 32 * widening, 64 * widening):
        first = 2 * before + 9 * before * width + 2 * width + 9 * width**2 + before * width
        others = 2 * (2 * width + 9 * width**2)
        total += first + ((depth - 4) // 6 - 1) * others
        before = width
    return total + 2 * before + (before + 1) * num_classes


def densenet_by_hand(depth: int, growth: int, num_classes: int = 10) -> int:
    """Sum over layers by the closed form: n layers on c channels see n c + k n (n - 1) / 2 inputs in all."""
    num_layers, channels, total = (depth - 4) // 3, 16, 9 * 3 * 16
    for block in range(3):
        seen = num_layers * channels + growth * num_layers * (num_layers - 1) // 2
        total += seen * (2 + 9 * growth)
        channels += num_layers * growth
        if block < 2:
            total += 2 * channels + channels**2
    return total + 2 * channels + (channels + 1) * num_classes


def densenet_bc_by_hand(depth: int, growth: int, num_classes: int = 10) -> int:
    num_layers, channels = (depth - 4) // 6, 2 * growth
    total = 9 * 3 * channels
    for block in range(3):
        seen = num_layers * channels + growth * num_layers * (num_layers - 1) // 2
        # BN on the input, 1x1 to 4 k; then BN on 4 k and 3x3 to k.
        total += seen * (2 + 4 * growth) + num_layers * (8 * growth + 9 * 4 * growth**2)
        channels += num_layers * growth
        if block < 2:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
    return total + 2 * channels + (channels + 1) * num_classes


@pytest.mark.parametrize(
    ("name", "exact", "published"),
    [
        # arXiv 1605.07146, Table 4, in millions.
        ("wrn-40-2", wide_resnet_by_hand(40, 2), "2.2"),
        ("wrn-40-4", wide_resnet_by_hand(40, 4), "8.9"),
        ("wrn-16-8", wide_resnet_by_hand(16, 8), "11.0"),
        ("wrn-28-10", wide_resnet_by_hand(28, 10), "36.5"),
        # Not in that table: 16-4 is 2.7 M wherever it is quoted.
        ("wrn-16-4", wide_resnet_by_hand(16, 4), "2.7"),
        ("wrn-28-8", wide_resnet_by_hand(28, 8), None),
        # arXiv 1608.06993, Table 2.
        ("densenet-40-12", densenet_by_hand(40, 12), "1.0"),
        ("densenet-100-12", densenet_by_hand(100, 12), "7.0"),
        ("densenet-100-24", densenet_by_hand(100, 24), "27.2"),
        ("densenet-bc-100-12", densenet_bc_by_hand(100, 12), "0.8"),
        ("densenet-bc-100-24", densenet_bc_by_hand(100, 24), None),
        ("densenet-bc-250-24", densenet_bc_by_hand(250, 24), "15.3"),
        ("densenet-bc-190-40", densenet_bc_by_hand(190, 40), "25.6"),
        # arXiv 1512.03385, Table 6, with two digits after the point.
        ("resnet20", 269_722, "0.27"),
        ("resnet56", 853_018, "0.85"),
        # 9 * 3 * 16 + 16, 9 * 16 * 32 + 32, 9 * 32 * 32 + 32, and 32 * 4 * 4 features to 10 classes.
        ("small-cnn", 448 + 4640 + 9248 + 5130, None),
        # 9 * 3 * 64 + 64, 9 * 64 * 128 + 128, 9 * 128 * 256 + 256, 9 * 256 * 256 + 256, and 256 * 2 * 2 to 10.
        ("medium-cnn", 1792 + 73_856 + 295_168 + 590_080 + 10_250, None),
        # 9 * 3 * 32 + 32, 9 * 32 * 32 + 32, 9 * 32 * 64 + 64, 9 * 64 * 64 + 64, and 64 * 8 * 8 to 10.
        ("shallow-cnn", 896 + 9248 + 18_496 + 36_928 + 40_970, None),
        ("mlp", 3072 * 25 + 25 + 26 * 10, None),
    ],
)
def test_parameters_by_hand_and_as_published(name: str, exact: int, published: str | None) -> None:
    with torch.device("meta"):
        model = reference_model(name, 3, 10, 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == exact
    if published is not None:
        assert f"{exact / 1e6:.{len(published.partition('.')[2])}f}" == published


def test_weighted_layers_are_the_depth_in_the_name() -> None:
    def convolutions(name: str, kernel_sizes: tuple[int, ...] = (1, 3)) -> int:
        modules = reference_model(name, 3, 10, 32).modules()
        return sum(isinstance(part, nn.Conv2d) and part.kernel_size[0] in kernel_sizes for part in modules)

    # Wide ResNets count convolutions, three projections among them; the others count the classifier too.
    assert (convolutions("wrn-16-4"), convolutions("wrn-16-4", (3,))) == (16, 13)
    for name, depth in (("densenet-40-12", 40), ("densenet-bc-100-12", 100), ("resnet20", 20)):
        assert convolutions(name) + 1 == depth
    assert convolutions("shallow-cnn") == 4


@pytest.mark.parametrize("image_size", [8, 13])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", LIGHT)
def test_any_images_go_through(name: str, in_channels: int, image_size: int) -> None:
    torch.manual_seed(0)
    model = reference_model(name, in_channels, 7, image_size).eval()
    images = torch.randn(2, in_channels, image_size, image_size)
    with torch.inference_mode():
        logits = model(images)
        alone = model(images[:1])
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    torch.testing.assert_close(alone, logits[:1], atol=1e-4, rtol=1e-4)


def test_every_parameter_learns() -> None:
    for name in ("wrn-10-1", "densenet-7-4", "densenet-bc-10-4", "resnet8", "small-cnn", "medium-cnn", "mlp"):
        torch.manual_seed(0)
        model = reference_model(name, 1, 3, 16)
        F.cross_entropy(model(torch.randn(8, 1, 16, 16)), torch.arange(8) % 3).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_shortcuts_alone_are_the_identity_or_subsampling() -> None:
    features = torch.rand(2, 4, 5, 5)
    block = ResNetBlock(4, 6, 2).eval()
    nn.init.zeros_(block.residual[-1].weight)
    expected = torch.cat([features[:, :, ::2, ::2], torch.zeros(2, 2, 3, 3)], dim=1)
    assert torch.equal(block(features), expected)
    wide = WideBlock(4, 4, 1, dropout=0.0).eval()
    nn.init.zeros_(wide.residual[-1].weight)
    assert torch.equal(wide(features), features)


def test_dense_connectivity_keeps_every_earlier_feature() -> None:
    model = DenseNet(depth=10, growth_rate=3, bottleneck=False, in_channels=1, num_classes=2).eval()
    first, one, two = model.features[0], model.features[1], model.features[2]
    with torch.inference_mode():
        start = first(torch.randn(1, 1, 8, 8))
        between = one(start)
        after = two(between)
    assert after.shape == (1, 16 + 3 + 3, 8, 8)
    assert torch.equal(after[:, :16], start)
    assert torch.equal(after[:, 16:19], between[:, 16:])


def test_dropout_is_where_it_was_asked_for() -> None:
    def dropouts(model: nn.Module) -> list[float]:
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]

    assert dropouts(WideResNet(depth=16, widening=1, in_channels=1, num_classes=2, dropout=0.3)) == [0.3] * 6
    assert set(dropouts(reference_model("small-cnn", 1, 2, 8))) == {0.1}
    assert len(dropouts(reference_model("medium-cnn", 1, 2, 8))) == 4


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("wrn-16_4", "Did you mean wrn-16-4"),
        ("Smal-CNN", "Did you mean small-cnn"),
        ("densnet-40-12", "Did you mean densenet-40-12"),
        ("resnet21", "Use 20"),
        ("wrn-28", "Did you mean wrn-28-"),
        ("wrn-17-4", "Use 16"),
        ("wrn-4-4", "Use 10"),
        ("densenet-bc-100-12x", "Did you mean densenet-bc-100-12"),
        ("densenet-bc-41-12", "Use 40"),
        ("xyz", "Known are wrn-16-4"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(name: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        reference_model(name, 3, 10, 32)
    assert remedy in caught.value.remedy


def test_names_in_other_writings() -> None:
    assert isinstance(reference_model("ResNet20v1", 1, 2, 8), ResNet)
    assert isinstance(reference_model("WRN-10-1", 1, 2, 8), WideResNet)


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (lambda: reference_model("mlp", 0, 10, 32), "in_channels = 0"),
        (lambda: reference_model("mlp", 3, 0, 32), "num_classes = 0"),
        (lambda: reference_model("mlp", 3, 10, 7), "7 pixels"),
        (lambda: reference_model("densenet-40-0", 1, 2, 8), "growth_rate = 0"),
        (lambda: reference_model("resnet50", 3, 10, 32), "network for ImageNet"),
        (lambda: reference_model("ResNet-152", 3, 10, 32), "network for ImageNet"),
        (lambda: reference_model("small-cnn", 1, 2, 8)(torch.zeros(1, 1, 9, 8)), "9 x 8 pixels"),
        (lambda: PlainCNN(channels=(), in_channels=1, num_classes=2, image_size=8), "convolutions = 0"),
        (
            lambda: WideResNet(depth=10, widening=1, in_channels=1, num_classes=2, dropout=1.0),
            r"dropout probability is 1\.0",
        ),
    ],
)
def test_bad_arguments(build: Callable[[], object], cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        build()


@pytest.mark.parametrize("name", ["wrn-10-1", "densenet-bc-10-4", "resnet8", "medium-cnn", "mlp"])
def test_a_description_rebuilds_the_model(name: str) -> None:
    model = reference_model(name, 1, 3, 8).eval()
    spec = json.loads(json.dumps(model.spec()))
    rebuilt = model_from_spec(spec).eval()
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(images), rebuilt(images))
    assert rebuilt.spec() == model.spec()


def test_foreign_descriptions_are_refused() -> None:
    spec = MLP(in_features=2, num_classes=3).spec()
    for wrong in ({}, {**spec, "kind": "network"}, {**spec, "model": "Module"}, {**spec, "arguments": None}):
        with pytest.raises(UserError, match="not of a reference model"):
            model_from_spec(wrong)
    with pytest.raises(UserError, match="does not fit"):
        model_from_spec({**spec, "arguments": {"units": 3}})


def test_an_ensemble_of_reference_models_is_saved_and_loaded(tmp_path) -> None:
    torch.manual_seed(0)
    ensemble = Ensemble([reference_model(name, 1, 3, 8) for name in ("wrn-10-1", "small-cnn", "mlp")]).eval()
    images = torch.randn(4, 1, 8, 8)
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path).eval()
    np.testing.assert_array_equal(loaded.predict_probs(images), ensemble.predict_probs(images))
