"""The rooms that several studies use."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from studies.bench import Bench
from studies.comparisons import compare_pairs
from studies.options import StudyOptions
from studies.records import append_line, read_lines
from studies.report import markdown_table
from studies.snapshot_trainings import train

from dnas_ens.ensembles.snapshot import CosineCycles
from dnas_ens.run.files import read_json, with_ending

OPTIONS = StudyOptions(
    model="mlp", data="digits", limit_train=200, epochs=4, learning_rate=0.05, device="cpu", seeds=1
)
CYCLES = CosineCycles(epochs=4, num_cycles=2, initial_learning_rate=0.05)


@pytest.fixture(scope="module")
def bench():
    return Bench.of(OPTIONS)


def test_an_unfinished_last_line_is_cut_off(tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    assert read_lines(file) == []
    append_line(file, {"seed": 0})
    # As a process leaves it that was killed while it wrote.
    with file.open("a") as stream:
        stream.write('{"seed": 1, "lo')
    assert read_lines(file) == [{"seed": 0}]
    assert "the last line is unfinished" in capsys.readouterr().err
    append_line(file, {"seed": 2})
    assert read_lines(file) == [{"seed": 0}, {"seed": 2}]
    assert not capsys.readouterr().err


def test_an_output_keeps_its_dots():
    assert with_ending(Path("out/lambda-0.5"), ".md") == Path("out/lambda-0.5.md")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_interrupted_training_goes_on_to_the_same_snapshots(bench, tmp_path, monkeypatch):
    whole = train(bench, tmp_path / "whole", CYCLES, root=3, member=1)
    assert [len(whole.states), whole.record["snapshot_steps"]] == [2, [6, 12]]
    ordinary = CosineCycles.learning_rate_at

    def interrupted(schedule, step, steps_per_epoch):
        if step == 11:
            raise KeyboardInterrupt
        return ordinary(schedule, step, steps_per_epoch)

    with monkeypatch.context() as patched:
        patched.setattr(CosineCycles, "learning_rate_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(bench, tmp_path / "broken", CYCLES, root=3, member=1)
    assert not (tmp_path / "broken" / "training.json").exists()
    assert list((tmp_path / "broken" / "checkpoints").iterdir())
    again = train(bench, tmp_path / "broken", CYCLES, root=3, member=1)
    assert all(same(*pair) for pair in zip(whole.states, again.states, strict=True))
    assert again.record["train_loss"] == whole.record["train_loss"]
    assert read_json(tmp_path / "broken" / "training.json") == again.record
    other = train(bench, tmp_path / "other", CYCLES, root=3, member=2)
    assert not same(whole.states[0], other.states[0])


def test_a_training_is_plain_sgd(bench):
    """Against torch alone: one epoch of the same batches by hand."""
    training = bench.training(root=0, member=0, name="a training")
    model = bench.model()
    model.load_state_dict(training.model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    order, augmentation = torch.Generator(), torch.Generator()
    order.set_state(training.order.get_state())
    augmentation.set_state(training.augmentation.get_state())
    losses = []
    for images, labels in training.training_pass(order, augmentation):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert training.run_epoch(learning_rate=0.03) == pytest.approx(np.mean(losses), rel=1e-5)
    assert training.epoch == 1
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(training.model.state_dict()[name], tensor)


def test_branches_begin_alike_and_see_other_batches(bench):
    first, second = (bench.training(root=0, member=member, name="a branch") for member in (0, 1))
    first.run_epoch()
    order = second.order.get_state()
    second.branch_off(first.state_dict())
    assert second.epoch == 1
    assert same(first.model.state_dict(), second.model.state_dict())
    assert torch.equal(second.order.get_state(), order)
    before = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    second.run_epoch()
    # Neither weights nor momentum are shared.
    assert same(before, first.model.state_dict())
    assert not same(before, second.model.state_dict())
    states = [training.optimizer.state_dict()["state"][0]["momentum_buffer"] for training in (first, second)]
    assert not torch.equal(*states)


def test_pairs_are_corrected_together():
    generator = np.random.default_rng(0)
    # As few images as let all sign changes be counted.
    losses = {
        name: generator.normal(loc=shift, size=(2, 12)) for name, shift in (("a", 0), ("b", 1), ("c", 1))
    }
    pairs = [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b")]
    found = compare_pairs(losses, pairs)
    assert list(found) == pairs[:3]
    raw = [
        stats.permutation_test(
            ((losses[first] - losses[second]).mean(axis=0),), np.mean, permutation_type="samples"
        ).pvalue
        for first, second in pairs[:3]
    ]
    ranked = sorted(raw)
    corrected = [max(min(1.0, (3 - rank) * ranked[rank]) for rank in range(ranked.index(p) + 1)) for p in raw]
    assert [each.p_value for each in found.values()] == pytest.approx(corrected)
    assert found["a", "b"].mean == pytest.approx((losses["a"] - losses["b"]).mean())


def test_markdown_table_aligns_text_and_numbers():
    assert markdown_table(["a", "b", "c"], [["x", "1", "y"]], num_text_columns=2) == (
        "| a | b | c |\n|:--|--:|:--|\n| x | 1 | y |\n"
    )


def test_the_published_scale_is_known():
    assert StudyOptions().is_published
    assert StudyOptions(seeds=9, device="cpu").is_published
    assert not OPTIONS.is_published
    assert OPTIONS.recipe.gradient_clip == float("inf")
    assert OPTIONS.recipe.weight_decay == 5e-4
