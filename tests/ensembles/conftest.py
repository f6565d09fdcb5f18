"""Ensembles of real members of three kinds, and builders of such members."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.nn.network import Network
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.stack import StackSpec

PREPROCESSING = Preprocessing(image_size=8, num_channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CLASSES = ("ant", "bee", "cat")
CELL = ((("skip_connect", 0), ("sep_conv_3x3", 1)), (("max_pool_3x3", 1), ("skip_connect", 2)))
STACK = StackSpec(num_cells=3, channels=2, in_channels=3, num_classes=3)


def _small_network(num_classes=3):
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, num_classes)
    return nn.Sequential(*layers)


def _own_network(seed):
    torch.manual_seed(seed)
    return Network(Genotype(normal=CELL, reduction=CELL), STACK, auxiliary=True)


def _mixed_members(seed=0):
    torch.manual_seed(seed)
    return [resnet18(num_classes=3), _small_network()]


small_network = pytest.fixture(lambda: _small_network, name="small_network")
own_network = pytest.fixture(lambda: _own_network, name="own_network")
mixed_members = pytest.fixture(lambda: _mixed_members, name="mixed_members")


@pytest.fixture
def ensemble():
    return Ensemble(_mixed_members(), weights=[1.0, 3.0], temperature=1.7, classes=CLASSES, preprocessing=PREPROCESSING)


@pytest.fixture
def own_ensemble():
    return Ensemble([_own_network(seed) for seed in range(3)], classes=CLASSES, preprocessing=PREPROCESSING)
