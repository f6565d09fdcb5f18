"""Where a budget went, as the report shows it."""

import pytest

from dnas_ens.report.budget import draw_budget


def done(kind, number, *, cost, at, loss):
    unit = {"kind": kind, "number": number, "cell": 0, "epochs": 9}
    return {"unit": unit, "epochs": 7, "cost": cost, "at": at, "loss": loss, "alone": loss, "members": [number]}


@pytest.mark.parametrize(("scale", "label"), [(1.0, "seconds spent"), (60.0, "minutes spent")])
def test_units_that_were_trained_side_by_side_are_drawn_where_they_ended(scale, label):
    ends, losses = [5.0, 12.0, 12.5], [1.0, 0.9, 0.85]
    units = [
        done("first", 0, cost=5.0 * scale, at=ends[0] * scale, loss=losses[0]),
        done("copy", 1, cost=7.0 * scale, at=ends[1] * scale, loss=losses[1]),
        done("copy", 2, cost=7.4 * scale, at=ends[2] * scale, loss=losses[2]),
    ]
    (axis,) = draw_budget(units, timed=True).axes
    assert axis.get_xlabel() == label
    line = axis.lines[0]
    assert list(line.get_xdata()) == pytest.approx(ends)
    assert list(line.get_ydata()) == losses
