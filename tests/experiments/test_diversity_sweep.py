"""The EdgeNES studies: arithmetic against hand computation, and a tiny study whose figures are computed anew."""

import statistics
from collections import Counter

import numpy as np
import pytest
from scipy.special import softmax
from studies.diversity_sweep import searches as sweep_searches
from studies.diversity_sweep.searches import (
    BASE_SETTING,
    STEERED,
    Study,
    chosen_on_other_half,
    limited_ensemble,
    matched_samples,
    searches,
    sweep,
    trainings,
)
from studies.diversity_sweep.tables import mean_height
from studies.search_studies import load

from dnas_ens.data import load_data
from dnas_ens.data.splits import alternating_halves
from dnas_ens.errors import UserError
from dnas_ens.search.loop import SearchLoop
from dnas_ens.space.genotype import Genotype, random_deviation

TINY = {
    "epochs": 3,
    "limit_train": 96,
    "candidate_recipe_epochs": 1,
    "evaluations": 2,
    "lambdas": 5,
    "members": 2,
    "samples": 1,
}
OPERATIONS = ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")


@pytest.fixture(scope="module", autouse=True)
def small(narrow):
    with narrow(sweep_searches):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_here, small):
    folder = tmp_path_factory.mktemp("sweep")
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    arguments += ["--seeds=2", f"--run-dir={folder / 'run'}", f"--output={folder / 'out'}"]
    return folder, arguments, run_here("diversity_sweep", *arguments)


def predictions(folder, seed, name):
    return np.load(folder / "run" / f"seed-{seed}" / f"{name}.npz")


def test_the_mean_height_is_the_area_by_trapezia_over_the_length():
    # A triangle over 0 to 3 of height 2 has area 3, so that its mean height is 1.
    assert mean_height([0, 1, 3], np.array([0.0, 2.0, 0.0]), axis=0) == 1.0
    assert mean_height([4], np.array([[0.5, 0.7]]), axis=0).tolist() == [0.5, 0.7]


def test_no_half_is_predicted_by_members_that_it_chose():
    labels = np.arange(40) % 2
    first, second = alternating_halves(labels)
    right, wrong = np.eye(2)[labels] * 0.8 + 0.1, np.eye(2)[1 - labels] * 0.8 + 0.1
    # Each candidate is right on one half alone, so that both halves are chosen for what fails on the other.
    probs = np.stack([right, right])
    probs[0, second], probs[1, first] = wrong[second], wrong[first]
    averaged = chosen_on_other_half(probs, labels, 1)
    assert (averaged.argmax(1) != labels).all()
    # With both as members nothing is left to choose: every prediction is an even mean.
    assert chosen_on_other_half(probs, labels, 2) == pytest.approx(np.full((40, 2), 0.5))


def test_ensembles_are_chosen_within_the_limit():
    labels = np.arange(12) % 3
    probs = np.stack([softmax(scale * np.eye(3)[labels], axis=1) for scale in (1.0, 2.0, 9.0)])
    nearest = {"base": 0.0, "near": 0.4, "far": 0.8}
    near = limited_ensemble(0.4, nearest, probs, labels, 1)
    assert (near["candidates"], near["cells"]) == (2, ["near"])
    assert limited_ensemble(0.8, nearest, probs, labels, 1)["cells"] == ["far"]
    # Fewer than asked for where there are no more.
    assert sorted(limited_ensemble(0.4, nearest, probs, labels, 5)["cells"]) == ["base", "near"]


def test_deviations_share_as_many_edges_as_the_samples():
    edges = ("sep_conv_3x3", 0), ("max_pool_3x3", 1), ("dil_conv_3x3", 2), ("skip_connect", 1)
    base = Genotype(reduction=tuple((edge,) for edge in edges))
    generator = np.random.default_rng(1)
    drawn = [
        random_deviation(base, num_edges=number, operations=OPERATIONS, generator=generator)
        for number in (1, 1, 1, 2, 2, 3, 3, 4)
    ]
    genotypes = {genotype.canonical_hash(): genotype for genotype in (base, *drawn)}
    samples, deviations = matched_samples(genotypes, base, num_samples=2, operations=OPERATIONS, seed=0)
    shared = [base.shared_edges(genotypes[cells]) for cells in samples]
    assert [base.shared_edges(genotype) for genotype in deviations] == shared
    assert max(Counter(shared).values()) == 2
    assert base.num_edges not in shared
    assert len({genotype.canonical() for genotype in (base, *deviations)}) == len(deviations) + 1


def test_tables_hold_what_predictions_say(finished, read_lines, cells):
    folder, _, printed = finished
    text = (folder / "out.md").read_text()
    labels = load_data("digits", limit_train=96).test.labels.numpy()
    records = read_lines(folder / "out.jsonl")
    searches = {(each["setting"], each["seed"]): each for each in records if each["kind"] == "search"}
    assert len(searches) == 2 * 7

    def percent(shares):
        return f"{100 * statistics.fmean(shares):.2f} ± {100 * statistics.stdev(shares):.2f}"

    def accuracy(seed, names):
        probs = [predictions(folder, seed, f"training-{name}")["test_probs"] for name in names]
        return (np.mean(probs, axis=0).argmax(1) == labels).mean()

    for way in STEERED:
        of_way = [searches[way, seed] for seed in range(2)]
        # The first point is the base's end of direction 0.
        assert {(record["points"][0]["lam"], record["points"][0]["direction"]) for record in of_way} == {(0, 0)}
        single = [accuracy(seed, [record["points"][0]["cells"]]) for seed, record in enumerate(of_way)]
        joint = [accuracy(seed, record["ensembles"][-1]["cells"]) for seed, record in enumerate(of_way)]
        areas = []
        for record in of_way:
            epochs = [each["epoch"] for each in record["epochs"]]
            height = np.trapezoid([each["val_accuracy"] for each in record["epochs"]], epochs)
            areas.append(height / (epochs[-1] - epochs[0]))
        assert cells(text, f"{way}, λ = 0")[3] == percent(single)
        limit = of_way[0]["ensembles"][-1]["limit"]
        assert cells(text, f"{way}, Λ = {limit:g}")[4] == percent(joint)
        assert cells(text[text.index("## e.") :], way)[-2] == percent(areas)
    for figure in "92.10|86.4 to 90.6|62.4|57.7|46.8 ± 1.7|48.1 ± 1.7|47.7 ± 3.4|2.1 h".split("|"):
        assert f"| {figure} |" in text
    assert text.rstrip().endswith("Other work ran on the same machine.")
    assert "## e. The ensemble against search epochs" in printed
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_measuring_does_not_disturb_the_search(finished, read_lines):
    folder, _, _ = finished
    record = next(each for each in read_lines(folder / "out.jsonl") if each.get("setting") == "star")
    study = Study(**TINY)
    config = study.configuration("star", 0)
    loop = SearchLoop(config, load(config.data))
    for _ in range(config.bilevel.epochs):
        loop.run_epoch()
    undisturbed = sweep(loop, study.lambdas)
    assert [(point["cells"], point["distance"]) for point in record["points"]] == [
        (candidate.genotype.canonical_hash(), pytest.approx(candidate.distance_to_base)) for candidate in undisturbed
    ]
    # The mean of the stored losses is the NLL of the record.
    losses = predictions(folder, 0, "search-star")["epoch_losses"]
    assert losses.shape == (2, 359)
    assert losses.mean(axis=1) == pytest.approx([entry["val_nll"] for entry in record["epochs"]])


def test_only_what_is_missing_is_run_again(finished, timeless):
    folder, _, _ = finished
    study = Study(**TINY, seeds=2, run_dir=folder / "run", output=folder / "out")

    def missing():
        records = study.records()
        tasks = [{("search", BASE_SETTING, seed): None} for seed in range(2)]
        tasks += [stage(study, records, seed) for stage in (searches, trainings) for seed in range(2)]
        return {key: task for of_stage in tasks for key, task in of_stage.items() if key not in records}

    assert missing() == {}
    lost = next(record for record in study.records() if record["kind"] == "training" and record["seed"] == 1)
    place = folder / "run" / "seed-1" / f"training-{lost['cells']}.npz"
    before = dict(np.load(place))
    place.unlink()
    (task,) = missing().values()
    record, again = task()
    assert timeless([record]) == timeless([lost])
    assert all((again[name] == values).all() for name, values in before.items())
    study.records().add(record, again)
    assert missing() == {}


def test_results_of_other_settings_are_not_mixed(finished, run_here):
    with pytest.raises(UserError, match="with other settings"):
        run_here("diversity_sweep", *finished[1], "--members=3")
