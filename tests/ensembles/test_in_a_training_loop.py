"""The parts together, as in the README: one training loop, snapshots, fitted weights, an ensemble, a soup."""

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from sklearn.metrics import log_loss

from dnas_ens.data.batches import iterate_batches
from dnas_ens.data.dataset import Split
from dnas_ens.ensembles import CosineCycles, Ensemble, SnapshotRecorder, fit_weights, greedy_soup
from dnas_ens.nn.network import Network
from dnas_ens.nn.reference_models import reference_model
from dnas_ens.space.genotype import random_genotype
from dnas_ens.space.search_space import DARTS_OPERATIONS
from dnas_ens.space.stack import StackSpec
from dnas_ens.training.prediction import predict_members


def train(network, optimizer, batches, epochs, recorder=None):
    network.train()
    for _ in range(epochs):
        for images, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            if recorder is not None:
                recorder.step()


def test_snapshots_become_an_ensemble_and_a_soup(digits):
    torch.manual_seed(0)
    network = reference_model("small-cnn", 1, 10, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    def train_batches():
        return iterate_batches(digits.train, 64)

    def val_batches():
        return iterate_batches(digits.val, 256)

    steps = len(list(train_batches()))
    schedule = CosineCycles(epochs=9, num_cycles=3, initial_learning_rate=0.1)
    recorder = SnapshotRecorder(network, optimizer, schedule, steps_per_epoch=steps)
    train(network, optimizer, train_batches, 9, recorder)
    members = list(recorder.members())
    probs, labels = predict_members(members, val_batches)
    assert probs.shape == (3, len(digits.val), 10)
    fitted = fit_weights(probs, labels)
    averaged = np.tensordot(fitted.weights, probs, axes=1)
    assert (
        log_loss(labels, averaged)
        <= min(log_loss(labels, part) for part in (*probs, probs.mean(axis=0))) + 1e-9
    )
    images, _ = next(iter(val_batches()))
    ensemble = Ensemble(members, weights=fitted.weights).eval()
    torch.testing.assert_close(
        ensemble(images).double(), torch.from_numpy(averaged[: len(images)]), rtol=1e-5, atol=1e-6
    )
    soup = greedy_soup(network, members, train_batches, val_batches)
    single, _ = predict_members([soup.model], val_batches)
    assert abs(soup.val_nll - log_loss(labels, single[0])) < 1e-6


def test_a_resnet_and_a_cell_train_save_load_and_predict_the_same(few_digits, tmp_path):
    torch.manual_seed(0)

    def resnet():
        network = torchvision.models.resnet18(num_classes=10)
        network.conv1 = torch.nn.Conv2d(1, 64, 3, padding=1, bias=False)
        return network

    genotype = random_genotype(
        np.random.default_rng(0), operations=DARTS_OPERATIONS, num_nodes=2, cell_types=("reduction",)
    )
    cell = Network(genotype, StackSpec(num_cells=1, channels=4, in_channels=1, num_classes=10))
    members = [resnet(), cell]
    small = Split(images=few_digits.train.images[:32], labels=few_digits.train.labels[:32])
    for network in members:
        before = [parameter.detach().clone() for parameter in network.parameters()]
        train(network, torch.optim.SGD(network.parameters(), lr=0.01), lambda: iterate_batches(small, 16), 1)
        assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
    ensemble = Ensemble(members, weights=[0.3, 0.7], temperature=1.5).eval()
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path, members=[resnet()]).eval()
    images, _ = next(iter(iterate_batches(small, 16)))
    with torch.no_grad():
        assert torch.equal(loaded(images), ensemble(images))
        assert torch.equal(loaded.member_probs(images), ensemble.member_probs(images))
