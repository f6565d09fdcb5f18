import numpy as np
import pytest

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.figures import style
from dnas_ens.report.members import difference_section, draw_disagreement, draw_embedding
from dnas_ens.report.methods import draw_cost, frontier_of
from dnas_ens.report.panels import LabelPlacer, around, panel, plain, spread
from dnas_ens.report.run_files import RunFiles
from dnas_ens.report.shift import mean_by_severity


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_labels_keep_clear_of_each_other():
    figure, axis = panel(x_label="", y_label="")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    places = [(0.5, 0.5), (0.51, 0.5), (0.5, 0.52)]
    assert spread([2.0, 1.0, 2.0], 1.0) == pytest.approx([5 / 3, 2 / 3, 8 / 3])
    assert plain("a$b$\x00") == r"a\$b\$" + "\ufffd"
    placer = LabelPlacer(axis, places)
    for place in places:
        placer.add("label", place, around("label", size=9.5, reach=(0, 10, 20)))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(3) for j in range(i))


def test_cost_marks_ours_and_the_frontier_that_no_cheaper_method_beats():
    cost, loss = np.array([3.0, 1.0, 2.0, 2.0, 4.0]), np.array([0.2, 0.5, 0.6, 0.4, 0.2])
    assert frontier_of(cost, loss) == [1, 3, 0]
    figure = draw_cost([1, 100], [0.2, 0.1], labels=["1 ours", "2"], ours=[True, False], intervals=[(0.1, 0.3), None])
    assert texts(figure) == ["1 ours", "2"]
    assert figure.axes[0].get_xscale() == "log"
    assert draw_cost([5], [0.1], labels=["1"], ours=[False]).axes[0].get_xscale() == "linear"


def test_mean_by_severity():
    given = (("ensemble", 2, 0.4), ("ensemble", 1, 0.8), ("ensemble", 1, 0.6), ("best single", 1, 0.1))
    rows = [dict(zip(("row", "severity", "accuracy"), row, strict=True)) for row in given]
    assert mean_by_severity(rows, "ensemble", "accuracy") == pytest.approx({1: 0.7, 2: 0.4})


def test_disagreement_is_numbered_in_percent():
    assert texts(draw_disagreement([[0.0, 0.123], [0.123, 0.0]])) == ["12.3", "12.3"]
    assert texts(draw_disagreement(np.full((30, 30), 0.1))) == []


def test_errors_are_named_where_they_are_few():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    predicted = np.array([2, *labels[1:]])
    figure = draw_embedding(rng.normal(size=(60, 2)), labels, predicted, ["ant", "bee", "cat"])
    assert set(texts(figure)) == {"ant", "bee", "cat", "ant → cat"}
    # A hundred classes have no colours of their own, and many points are stored as pixels.
    labels = np.arange(900) % 100
    figure = draw_embedding(rng.normal(size=(900, 2)), labels, labels, [f"class {i}" for i in range(100)])
    assert texts(figure) == []
    svg = style.to_svg(figure)
    assert "data:image/png;base64" in svg
    assert len(svg) < 200_000


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (["ant", "bee", "cat"], True),
        # Drawn in one colour.
        ([f"class {index}" for index in range(15)], True),
        (["ant", "bee", "cat of a long name"], False),
    ],
)
def test_the_caption_promises_names_of_errors_where_they_are_drawn(tmp_path, monkeypatch, classes, named):
    places = np.random.default_rng(0).normal(size=(60, 2))
    monkeypatch.setattr("dnas_ens.report.members.embed", lambda probs: (places, np.arange(60)))
    labels = np.arange(60) % len(classes)
    probs = np.eye(len(classes))[None, [len(classes) - 1, *labels[1:]]]
    splits = {"val_probs": probs, "val_labels": labels, "test_probs": probs, "test_labels": labels}
    given = Predictions(**splits, classes=classes, weights=[1.0])
    (picture,) = difference_section(RunFiles(folder=tmp_path, config={}, predictions=given)).pictures
    assert ("true class → answer" in picture.caption) == named
    assert (f"{classes[0]} → {classes[-1]}" in texts(picture.figure)) == named
