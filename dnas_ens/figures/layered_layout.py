"""Order and place the items of a layered drawing: columns of boxes and lanes, linked to their neighbours.

Two steps of the method of Sugiyama et al. (1981): columns are ordered so that few links cross, and items
placed so that most links are level. Geometry only; lengths are in points, y grows downwards.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import combinations, pairwise

import numpy as np
from scipy.optimize import linprog

ITEM_GAP = 18.0
CLIMB_COSTS = (0.5, 1.0, 8.0)  # of links with no lane at their ends, with one, with two
CENTRE_COST = 2.0

Item = tuple[int, ...]  # (node,), or (source, target, column) for the lane of an edge
Link = tuple[Item, Item]  # in neighbouring columns, left and right


def fewest_crossings(
    columns: list[list[Item]], links: list[Link], heights: Mapping[Item, float]
) -> list[list[Item]]:
    """Reorder the columns by moving single items as long as that helps, from several starts.

    The inputs stay in their order, so that cells can be compared.
    """
    column_of = {item: index for index, column in enumerate(columns) for item in column}
    between = [[link for link in links if column_of[link[0]] == index] for index in range(len(columns))]

    def cost(order: list[list[Item]]) -> float:
        ys = {item: y for column in order for item, y in _stacked(column, heights).items()}
        total = 0.0
        for pairs in between:
            total += sum(abs(ys[left] - ys[right]) for left, right in pairs) / 1000
            total += sum(
                (ys[one[0]] - ys[two[0]]) * (ys[one[1]] - ys[two[1]]) < 0
                for one, two in combinations(pairs, 2)
            )
        return total

    def improved(order: list[list[Item]]) -> tuple[float, list[list[Item]]]:
        best, moved = cost(order), True
        while moved:
            moved = False
            for index in range(1, len(order)):
                for item in list(order[index]):
                    rest = [other for other in order[index] if other != item]
                    for place in range(len(rest) + 1):
                        trial = [*order[:index], [*rest[:place], item, *rest[place:]], *order[index + 1 :]]
                        trial_cost = cost(trial)
                        if trial_cost < best - 1e-9:
                            best, order, moved = trial_cost, trial, True
        return best, order

    shuffler = random.Random(0)
    starts = [columns]
    for _ in range(4):
        starts.append([columns[0], *(shuffler.sample(column, len(column)) for column in columns[1:])])
    return min((improved(start) for start in starts), key=lambda found: found[0])[1]


def level_links(
    columns: list[list[Item]],
    links: list[Link],
    *,
    shifts: Mapping[Link, float],
    heights: Mapping[Item, float],
) -> dict[Item, float]:
    """Place the items, keeping their order and distances, by a linear programme (Gansner et al., 1993).

    It minimises the weighted sum of |climb| over all links, which makes long edges exactly level wherever
    that is possible, and of |distance| of each node from the mean of its neighbours on either side.
    """
    items = [item for column in columns for item in column]
    unit = dict(zip(items, np.eye(len(items)), strict=True))  # unit[item] @ ys is the item's y
    wishes = [  # (row, value, cost): row @ ys should be near value
        (unit[left] - unit[right], shifts[left, right], CLIMB_COSTS[(len(left) > 1) + (len(right) > 1)])
        for left, right in links
    ]
    for item in (item for item in items if len(item) == 1):
        for side, sign in ((0, 1), (1, -1)):
            own = [link for link in links if link[side] == item]
            if own:
                mean = sum(unit[link[1 - side]] for link in own) / len(own)
                shift = sign * sum(shifts[link] for link in own) / len(own)
                wishes.append((unit[item] - mean, shift, CENTRE_COST))
    pairs = [pair for column in columns for pair in pairwise(column)]
    rows = np.array([row for row, _, _ in wishes])
    values = np.array([value for _, value, _ in wishes])
    order = np.array([unit[above] - unit[below] for above, below in pairs])
    gaps = np.array([ITEM_GAP + (heights[above] + heights[below]) / 2 for above, below in pairs])
    excess = np.eye(len(wishes))
    solution = linprog(
        [*np.zeros(len(items)), *(cost for _, _, cost in wishes)],
        A_ub=np.block([[rows, -excess], [-rows, -excess], [order, np.zeros((len(pairs), len(wishes)))]]),
        b_ub=np.concatenate([values, -values, -gaps]),
        bounds=(None, None),
        method="highs",
    )
    if solution.x is None:
        raise RuntimeError(f"No layout was found: {solution.message}")
    return {item: float(y) for item, y in zip(items, solution.x, strict=False)}


def _stacked(column: list[Item], heights: Mapping[Item, float]) -> dict[Item, float]:
    """Return the items' centres when they are stacked in this order around zero."""
    total = sum(heights[item] for item in column) + ITEM_GAP * (len(column) - 1)
    ys, y = {}, -total / 2
    for item in column:
        ys[item] = y + heights[item] / 2
        y += heights[item] + ITEM_GAP
    return ys
