import numpy as np
import pytest

from dnas_ens.evaluate.decisions import decisions, decisions_markdown
from dnas_ens.evaluate.predictions import Predictions


def predictions(seed=0, members=4, images=3000, classes=6):
    generator = np.random.default_rng(seed)
    parts = {}
    for split in ("val", "test"):
        labels = generator.integers(classes, size=images)
        logits = 2.5 * np.eye(classes)[labels] + generator.normal(size=(images, classes))
        logits = logits + generator.normal(size=(members, images, classes))
        probs = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
        parts |= {f"{split}_probs": probs.astype(np.float32), f"{split}_labels": labels}
    return Predictions(**parts, classes=[str(k) for k in range(classes)], weights=[0.1, 0.4, 0.3, 0.2])


def test_coverage_is_what_was_asked_for_and_the_cascade_loses_little():
    given = predictions()
    found = decisions(given)
    # Val and test each have a standard error of sqrt(0.9 * 0.1 / 3000).
    assert found["set_coverage"] == pytest.approx(0.9, abs=3 * (2 * 0.09 / 3000) ** 0.5)
    assert 1 <= found["set_size"] < 6
    right = np.average(given.test_probs, axis=0, weights=given.weights).argmax(axis=1) == given.test_labels
    assert found["cascade_accuracy"] == pytest.approx(right.mean(), abs=0.01)
    assert 1 < found["cascade_members"] < 4
    text = decisions_markdown(found, num_members=4, accuracy=float(right.mean()))
    assert f"asks {found['cascade_members']:.2f} of 4 members" in text
    assert f"{100 * found['set_coverage']:.2f} % of the test images" in text
    assert "cascade" not in decisions_markdown(found, num_members=1, accuracy=0.5)
