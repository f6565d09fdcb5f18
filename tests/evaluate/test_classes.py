import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

from dnas_ens.evaluate.classes import MAX_SHOWN, ClassFigures
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.run import write_results


def answering(answers, labels, num_classes):
    """One member that is sure of its answers."""
    probs, labels = np.eye(num_classes)[np.asarray(answers)][None], np.asarray(labels)
    splits = {"val_probs": probs, "val_labels": labels, "test_probs": probs, "test_labels": labels}
    return Predictions(**splits, classes=[f"class {index}" for index in range(num_classes)], weights=[1.0])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_figures_are_scikit_learns(pairs):
    labels, answers = map(list, zip(*pairs, strict=True))
    figures = ClassFigures.of(answering(answers, labels, 4))
    assert np.array_equal(figures.confusion, confusion_matrix(labels, answers, labels=range(4)))
    witness = precision_recall_fscore_support(labels, answers, labels=range(4), zero_division=np.nan)
    precision, recall, _, support = witness
    np.testing.assert_allclose([row.precision for row in figures.rows], precision)
    np.testing.assert_allclose([row.recall for row in figures.rows], recall)
    assert [row.num_images for row in figures.rows] == support.tolist()
    if len(set(labels)) > 1 and set(answers) <= set(labels):  # of others scikit-learn warns
        assert figures.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, answers))
    assert figures.majority_accuracy == max(map(labels.count, labels)) / len(labels)


def test_a_constant_answer_is_named_for_what_it_is(tmp_path):
    constant = answering([1] * 41, [0] + [1] * 40, 2)
    rows = write_results(tmp_path, constant)
    assert rows[-1]["accuracy"] == rows[-1]["majority_accuracy"] == 40 / 41
    assert rows[-1]["balanced_accuracy"] == 0.5
    assert rows[-1]["recall_per_class"] == {"class 0": 0.0, "class 1": 1.0}
    told = (tmp_path / "results.md").read_text()
    assert "Always answering 'class 1'" in told
    assert "Warning: with 97.6 % right the ensemble is no better" in told
    better = ClassFigures.of(answering([0] + [1] * 40, [0] + [1] * 40, 2))
    assert len(better.sentences()) == 1  # no warning


def test_of_many_classes_the_worst_are_shown():
    labels = np.repeat(np.arange(50), 2)
    answers = np.where(labels < 5, 49, labels)
    figures = ClassFigures.of(answering(answers, labels, 50))
    assert len(figures.shown) == MAX_SHOWN
    assert {row.name for row in figures.shown[:5]} == {f"class {index}" for index in range(5)}
    assert "the 20 of lowest recall of 50" in figures.to_markdown()
