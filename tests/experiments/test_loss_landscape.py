import itertools
import json
import re

import loss_landscape
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.optimize import minimize
from scipy.special import log_softmax

from dnas_ens.commands.parse import run_main
from dnas_ens.data import load_data

TINY = "--limit-train 160 --epochs 3 --checkpoints 2 --num-cells 1 --channels 4 --seeds 2".split()


@pytest.fixture(scope="module")
def study():
    """The script in this process: another one would mostly import."""
    return lambda *arguments: run_main(loss_landscape.main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """Two cells and one reference model, two seeds of each."""
    folder = tmp_path_factory.mktemp("study")
    arguments = [*TINY, "--models", "cells", "small-cnn", "--genotypes", 2, "--folder", folder / "run"]
    assert study(*arguments, "--output", folder / "out") == 0
    return folder, arguments


def records(folder, kind):
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_pairs_are_those_of_the_stored_predictions(finished):
    folder, _ = finished
    stored = np.load(folder / "run" / "predictions.npz")
    votes, labels = stored["test_probs"].argmax(2), stored["test_labels"]
    assert votes.shape == (6, 359)
    matrix = np.array([[(first != second).mean() for second in votes] for first in votes])
    found = np.array(records(folder, "disagreement of solutions")[0]["matrix"])
    np.testing.assert_allclose(found, matrix, atol=1e-4)
    # Seed pairs 01 and 23 are of the cells, whose other four pairs are of genotypes; small-cnn is no genotype.
    contrast = {record["measure"]: record for record in records(folder, "contrast")}
    assert contrast["disagreement"]["within"] == pytest.approx((matrix[0, 1] + matrix[2, 3]) / 2)
    assert contrast["disagreement"]["between"] == pytest.approx(matrix[:2, 2:4].mean())
    errors = (votes != labels).mean(axis=1)
    normalised = [matrix[i, j] / ((errors[i] + errors[j]) / 2) for i, j in ((0, 1), (2, 3))]
    assert contrast["normalised disagreement"]["within"] == pytest.approx(np.mean(normalised))
    # Three ways to make two pairs of four members.
    assert contrast["disagreement"]["num_groupings"] == 3
    text = (folder / "out.md").read_text()
    assert "**not** the scale of arXiv 1912.02757" in text
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_weights_are_those_of_the_stored_checkpoints(finished):
    folder, _ = finished
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    vectors = []
    for solution, epoch in itertools.product((0, 1), (0, 2, 3)):
        state = load_file(folder / "run" / f"solution-{solution}" / f"checkpoint-{epoch}.safetensors")
        weights = [value.ravel() for name, value in state.items() if not name.endswith(buffers)]
        vectors.append(np.concatenate(weights).astype(float))
    vectors = np.array([vector / np.linalg.norm(vector) for vector in vectors])
    found = np.array(records(folder, "weight cosines")[0]["matrix"])
    np.testing.assert_allclose(found, vectors @ vectors.T, atol=1e-4)


def test_every_size_has_its_ensembles(finished):
    sizes = {(record["of"], record["size"]): record for record in records(finished[0], "size")}
    stored = np.load(finished[0] / "run" / "predictions.npz")
    name = "genotypes: different architectures, one seed each"
    assert sizes[name, 2]["ensembles"] == 4
    accuracies = [
        (stored["test_probs"][[i, j]].mean(0).argmax(1) == stored["test_labels"]).mean() for i in (0, 1) for j in (2, 3)
    ]
    assert sizes[name, 2]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert sizes["reference models: seeds of one architecture", 2]["ensembles"] == 1
    # The best temperature on val, by another search than ours.
    averages = {
        split: [np.log(stored[f"{split}_probs"][list(pair)].astype(float).mean(0)) for pair in ((0, 1), (2, 3))]
        for split in ("val", "test")
    }

    def loss(split, pair, temperature):
        scaled = log_softmax(averages[split][pair] / temperature, axis=1)
        return -np.take_along_axis(scaled, stored[f"{split}_labels"][:, None], axis=1).mean()

    seeds = []
    for pair in (0, 1):
        found = minimize(lambda x, pair=pair: loss("val", pair, np.exp(x[0])), [0.0], method="Nelder-Mead")
        seeds.append(loss("test", pair, np.exp(found.x[0])))
    assert sizes["genotypes: seeds of one architecture", 2]["calibrated_nll"] == pytest.approx(np.mean(seeds), abs=1e-4)
    contrast = {record["measure"]: record for record in records(finished[0], "contrast")}
    assert contrast["calibrated NLL of both averaged"]["within"] == pytest.approx(np.mean(seeds), abs=1e-4)
    # The last of one checkpoint is the first solution itself.
    alone = (stored["test_probs"][0].argmax(1) == stored["test_labels"]).mean()
    assert sizes["last checkpoints of one training", 1]["accuracy"] == pytest.approx(alone)


def test_again_nothing_is_trained_and_other_settings_need_another_folder(study, finished, capsys):
    folder, arguments = finished
    before = (folder / "out.jsonl").read_text()
    assert study(*arguments, "--output", folder / "out") == 0
    assert "trained solution" not in capsys.readouterr().out
    assert (folder / "out.jsonl").read_text() == before
    assert study(*arguments, "--learning-rate", 0.01) == 2
    assert "learning_rate is 0.05 there and 0.01 here" in capsys.readouterr().err


def test_members_of_a_search_bring_their_data_and_recipe(study, tmp_path, capsys):
    cells = [
        {"genotype": {kind: [[["skip_connect", 0], [operation, 1]]] for kind in ("normal", "reduction")}}
        for operation in ("sep_conv_3x3", "max_pool_3x3", "sep_conv_3x3")
    ]
    run = tmp_path / "search"
    run.mkdir()
    # Channels are the preset's.
    recipe = {"num_cells": 1, "epochs": 2}
    search = {"preset": "micro", "data": {"data": "digits", "limit_train": 200}, "supernet": {"space": "darts"}}
    (run / "config.json").write_text(json.dumps({"search": search, "retrain": recipe}))
    (run / "genotypes.json").write_text(json.dumps({"candidates": cells, "selected": [2, 0, 1]}))
    fingerprint = load_data("digits", limit_train=200).fingerprint
    (run / "splits.json").write_text(json.dumps({"name": "digits", "fingerprint": fingerprint}))
    arguments = ("--run-dir", run, "--seeds", 2, "--folder", tmp_path / "run", "--output", tmp_path / "out")
    assert study(*arguments) == 0
    printed = capsys.readouterr().out
    # The same cell twice is one genotype.
    assert "# Loss landscape: digits, cell 0, cell 1\n" in printed
    assert "4 solutions (2 seeds an architecture), digits, 200 training" in printed
    assert study(*arguments, "--limit-train", 100) == 2
    assert re.fullmatch(r"error: .*own data.*\nremedy: .*\n", capsys.readouterr().err)
