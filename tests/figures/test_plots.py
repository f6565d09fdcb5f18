import xml.etree.ElementTree as ElementTree
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dnas_ens.errors import UserError
from dnas_ens.figures.plots import plot_diversity_curve
from dnas_ens.figures.style import to_svg

LAM, DISTANCE = [0.5, 0.0, 1.0, 0.25, 0.75], [0.45, 0.0, 0.9, 0.2, 0.7]
SHARED, DIRECTIONS = [9, 16, 2, 12, 5], [2, 2, 1, 1, 2]


def points(axis, name):
    (found,) = [line for line in axis.lines if line.get_gid() == name]
    return [(float(x), float(y)) for x, y in found.get_xydata()]


@pytest.mark.parametrize(("largest", "end"), [(4.0, 1.0), (0.5, 0.5)])
def test_one_line_in_the_order_of_lambda_beside_the_diagonal(largest, end):
    (axis,) = plot_diversity_curve([largest, 0.0], [0.4, 0.0]).axes
    assert points(axis, "distance_to_base-direction-0") == [(0.0, 0.0), (largest, 0.4)]
    # The diagonal ends where the first of both scales does.
    assert points(axis, "diagonal") == [(0, 0), (end, end)]
    assert len(axis.lines) == 2
    # Where lambda is no distance, none was asked for.
    (axis,) = plot_diversity_curve([largest, 0.0], [0.4, 0.0], is_distance=False).axes
    assert len(axis.lines) == 1


def test_every_direction_has_its_line_in_both_panels():
    distances, shared = plot_diversity_curve(LAM, DISTANCE, SHARED, directions=DIRECTIONS).axes
    assert points(distances, "distance_to_base-direction-1") == [(0.25, 0.2), (1.0, 0.9)]
    assert points(distances, "distance_to_base-direction-2") == [(0.0, 0.0), (0.5, 0.45), (0.75, 0.7)]
    assert points(shared, "shared_edges-direction-1") == [(0.25, 12), (1.0, 2)]
    assert points(shared, "shared_edges-direction-2") == [(0.0, 16), (0.5, 9), (0.75, 5)]
    assert distances.get_position().y0 > shared.get_position().y1
    assert distances.get_xlim() == shared.get_xlim()
    directions = np.repeat(np.arange(9), 2)
    (axis,) = plot_diversity_curve(np.tile([0, 1], 9), np.zeros(18), directions=directions).axes
    assert len({(drawn.get_color(), drawn.get_marker()) for drawn in axis.lines[1:]}) == 9
    colours = [[line.get_color() for line in panel.lines[-2:]] for panel in (distances, shared)]
    assert colours[0] == colours[1]


def test_texts_are_inside_the_figure_and_apart():
    figure = plot_diversity_curve(LAM, DISTANCE, SHARED, directions=DIRECTIONS)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["D = λ", "direction 1", "direction 2"]
    texts = [*legend.get_texts()]
    for axis in figure.axes:
        texts += [axis.xaxis.label, axis.yaxis.label]
        for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            ticks = side.get_major_ticks()
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_visible()]
    extents = {id(text): text.get_window_extent(canvas.get_renderer()) for text in texts if text.get_text()}
    assert len(extents) > 15
    for extent in extents.values():
        assert (extent.min >= figure.bbox.min).all()
        assert (extent.max <= figure.bbox.max).all()
    assert not any(one.overlaps(other) for one, other in combinations(extents.values(), 2))


def test_svg_is_valid_and_the_same_every_time():
    drawn = [to_svg(plot_diversity_curve(LAM, DISTANCE, SHARED), title="<&") for _ in range(2)]
    assert drawn[0] == drawn[1]
    names = {element.get("id") for element in ElementTree.fromstring(drawn[0]).iter()}
    assert {"diagonal", "distance_to_base-direction-0", "shared_edges-direction-0"} <= names
    assert "&lt;&amp;" in drawn[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lam": [0.1]}, "'lam': 1"),
        ({"lam": [], "distance_to_base": []}, "'lam': 0"),
        ({"distance_to_base": [0.0, 0.1, float("nan"), 0.3, 0.4]}, "distance_to_base"),
        ({"lam": [LAM]}, "(1, 5)"),
    ],
)
def test_data_that_is_no_curve_is_refused(arguments, named):
    with pytest.raises(UserError) as caught:
        plot_diversity_curve(**{"lam": LAM, "distance_to_base": DISTANCE, **arguments})
    assert named in caught.value.cause
