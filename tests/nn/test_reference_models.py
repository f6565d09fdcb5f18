"""Reference models: parameter counts by hand and as published, shapes, names, saving."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.errors import UserError
from dnas_ens.nn.reference_models import REFERENCE_MODELS, model_from_spec, reference_model
from dnas_ens.nn.reference_models.residual_networks import ResNet, ResNetBlock, WideBlock, WideResNet
from dnas_ens.nn.reference_models.small_networks import MLP, PlainCNN

#: Those that are small enough to run in a test.
LIGHT = [name for name in REFERENCE_MODELS if name not in ("wrn-28-8", "wrn-28-10", "densenet-100-24")]


@pytest.mark.parametrize(
    ("name", "exact", "published"),
    [
        # arXiv 1605.07146, Table 4, in millions; 16-4 as it is quoted. Exact: 3x3 convolutions have 9 a b weights,
        # BatchNorm 2 a, projections a b, the classifier (a + 1) K.
        ("wrn-40-2", 2_243_546, "2.2"),
        ("wrn-28-10", 36_479_194, "36.5"),
        ("wrn-16-4", 2_748_890, "2.7"),
        # arXiv 1608.06993, Table 2. Exact: n layers of growth k on c channels see n c + k n (n - 1) / 2 inputs in all.
        ("densenet-40-12", 1_019_722, "1.0"),
        ("densenet-100-12", 6_979_642, "7.0"),
        ("densenet-bc-100-12", 769_162, "0.8"),
        ("densenet-bc-190-40", 25_624_430, "25.6"),
        # arXiv 1512.03385, Table 6, with two digits after the point.
        ("resnet20", 269_722, "0.27"),
        ("resnet56", 853_018, "0.85"),
        # 9 a b + b of every convolution and a b + b of every linear layer.
        ("small-cnn", 448 + 4640 + 9248 + 5130, None),
        ("medium-cnn", 1792 + 73_856 + 295_168 + 590_080 + 10_250, None),
        ("shallow-cnn", 896 + 9248 + 18_496 + 36_928 + 40_970, None),
        ("mlp", 3072 * 25 + 25 + 26 * 10, None),
    ],
)
def test_parameters_by_hand_and_as_published(name, exact, published):
    with torch.device("meta"):
        model = reference_model(name, 3, 10, 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == exact
    if published is not None:
        assert f"{exact / 1e6:.{len(published.partition('.')[2])}f}" == published


@pytest.mark.parametrize("name", LIGHT)
def test_any_images_go_through(name):
    for in_channels, size in ((1, 8), (3, 13)):
        torch.manual_seed(0)
        model = reference_model(name, in_channels, 7, size).eval()
        images = torch.randn(2, in_channels, size, size)
        with torch.inference_mode():
            logits, alone = model(images), model(images[:1])
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        torch.testing.assert_close(alone, logits[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["wrn-10-1", "densenet-7-4", "densenet-bc-10-4", "resnet8", "small-cnn", "mlp"])
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    model = reference_model(name, 1, 3, 16)
    F.cross_entropy(model(torch.randn(8, 1, 16, 16)), torch.arange(8) % 3).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_shortcuts_alone_are_the_identity_or_subsampling():
    features = torch.rand(2, 4, 5, 5)
    block = ResNetBlock(4, 6, 2).eval()
    nn.init.zeros_(block.residual[-1].weight)
    assert torch.equal(block(features), torch.cat([features[:, :, ::2, ::2], torch.zeros(2, 2, 3, 3)], dim=1))
    wide = WideBlock(4, 4, 1, dropout=0.0).eval()
    nn.init.zeros_(wide.residual[-1].weight)
    assert torch.equal(wide(features), features)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("wrn-16_4", "Did you mean wrn-16-4"),
        ("Smal-CNN", "Did you mean small-cnn"),
        ("resnet21", "Use 20"),
        ("wrn-28", "Did you mean wrn-28-"),
        ("wrn-17-4", "Use 16"),
        ("densenet-bc-41-12", "Use 40"),
        ("xyz", "Known are wrn-16-4"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(name, remedy):
    with pytest.raises(UserError) as caught:
        reference_model(name, 3, 10, 32)
    assert remedy in caught.value.remedy
    assert isinstance(reference_model("ResNet20v1", 1, 2, 8), ResNet)


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (lambda: reference_model("mlp", 0, 10, 32), "in_channels = 0"),
        (lambda: reference_model("mlp", 3, 10, 7), "7 pixels"),
        (lambda: reference_model("densenet-40-0", 1, 2, 8), "growth_rate = 0"),
        (lambda: reference_model("resnet50", 3, 10, 32), "network for ImageNet"),
        (lambda: reference_model("small-cnn", 1, 2, 8)(torch.zeros(1, 1, 9, 8)), "9 x 8 pixels"),
        (lambda: PlainCNN(channels=(), in_channels=1, num_classes=2, image_size=8), "convolutions = 0"),
        (lambda: WideResNet(depth=10, widening=1, in_channels=1, num_classes=2, dropout=1.0), "dropout probability"),
    ],
)
def test_bad_arguments(build, cause):
    with pytest.raises(UserError, match=cause):
        build()


def test_an_ensemble_of_reference_models_is_saved_and_loaded(tmp_path):
    names = ("wrn-10-1", "densenet-bc-10-4", "resnet8", "small-cnn", "mlp")
    ensemble = Ensemble([reference_model(name, 1, 3, 8) for name in names]).eval()
    images = torch.randn(4, 1, 8, 8)
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path).eval()
    np.testing.assert_array_equal(loaded.predict_probs(images), ensemble.predict_probs(images))
    spec = MLP(in_features=2, num_classes=3).spec()
    for wrong in ({}, {**spec, "kind": "network"}, {**spec, "model": "Module"}, {**spec, "arguments": None}):
        with pytest.raises(UserError, match="not of a reference model"):
            model_from_spec(wrong)
    with pytest.raises(UserError, match="does not fit"):
        model_from_spec({**spec, "arguments": {"units": 3}})
