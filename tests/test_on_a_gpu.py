"""The whole way on a device: the same tests on a CPU, which CI has, and on a GPU."""

import copy

import numpy as np
import pytest
import torch

import dnas_ens as de
from dnas_ens.ensembles import Ensemble
from dnas_ens.run.files import read_json
from dnas_ens.training.trainer import _WeightAverage

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
RECIPE = {"num_cells": 2, "channels": 8, "batch_size": 16}


@DEVICES
@pytest.mark.parametrize("relaxation", ["gumbel-hard", "softmax"])
def test_cells_are_found_and_retrained(few_digits, tmp_path, device, relaxation):
    found = de.search(
        few_digits,
        device=device,
        members=2,
        epochs=3,
        warmup_epochs=1,
        batch_size=24,
        drawn_members=2,
        channels=4,
        pool_size=6,
        relaxation=relaxation,
    )
    assert len({genotype.canonical() for genotype in found.genotypes}) == 2
    trained = de.retrain(found, few_digits, device=device, folder=tmp_path, epochs=8, **RECIPE)
    assert next(trained.members.parameters()).device.type == device
    # Far from chance, which is 0.1.
    assert trained.evaluate(few_digits.val)["accuracy"] > 0.4


@DEVICES
def test_a_budget_is_spent_and_kept(few_digits, tmp_path, device):
    spent = de.spend(few_digits, 60, folder=tmp_path, device=device, **RECIPE)
    units = read_json(tmp_path / "budget.json")["done"]
    assert 54 <= sum(unit["epochs"] for unit in units) <= 60
    loaded = Ensemble.load(tmp_path)
    assert next(loaded.members.parameters()).device.type == "cpu"
    on_device, on_cpu = (ensemble.predict_probs(few_digits.val) for ensemble in (spent, loaded))
    assert on_device.shape == (len(units[-1]["members"]), len(few_digits.val), 10)
    np.testing.assert_allclose(on_device, on_cpu, atol=2e-4)


@pytest.mark.gpu
def test_what_comes_with_the_package_answers_alike():
    ensemble = de.load("fashion-mnist")
    pictures = torch.randint(256, (16, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(ensemble).predict_probs(pictures)
    found = ensemble.to("cuda").predict_probs(pictures)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@DEVICES
def test_weights_are_averaged_without_waiting(device):
    layer = torch.nn.Linear(3, 2).to(device)
    average, seen = _WeightAverage(layer), []
    for _ in range(5):
        torch.nn.init.normal_(layer.weight)
        seen.append(layer.weight.detach().clone())
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            average.add()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    average.apply()
    torch.testing.assert_close(layer.weight.detach(), torch.stack(seen).mean(0))
