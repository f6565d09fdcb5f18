from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import pytest

from dnas_ens.figures.layered_layout import ITEM_GAP, Item, Link, fewest_crossings, level_links


def num_crossings(columns: list[list[Item]], links: list[Link]) -> int:
    place = {item: (x, y) for x, column in enumerate(columns) for y, item in enumerate(column)}
    return sum(
        place[one[0]][0] == place[two[0]][0]
        and (place[one[0]][1] - place[two[0]][1]) * (place[one[1]][1] - place[two[1]][1]) < 0
        for one, two in combinations(links, 2)
    )


@pytest.mark.parametrize("seed", range(6))
def test_order_has_as_few_crossings_as_any(seed: int) -> None:
    generator = np.random.default_rng(seed)
    columns: list[list[Item]] = [[(0,), (1,)], [(2,), (3,), (4,), (5,)], [(6,), (7,), (8,)]]
    links = [
        (left, right)
        for first, second in ((0, 1), (1, 2))
        for left in columns[first]
        for right in columns[second]
        if generator.random() < 0.5
    ]
    ordered = fewest_crossings(columns, links, {item: 20.0 for column in columns for item in column})
    assert ordered[0] == columns[0]
    assert [sorted(column) for column in ordered] == columns
    best = min(
        num_crossings([columns[0], list(second), list(third)], links)
        for second, third in product(permutations(columns[1]), permutations(columns[2]))
    )
    assert num_crossings(ordered, links) == best


def test_distances_are_kept_and_lone_links_are_level() -> None:
    columns: list[list[Item]] = [[(0,), (1,)], [(2,), (3,)], [(4,)]]
    links: list[Link] = [((0,), (2,)), ((1,), (3,)), ((2,), (4,)), ((3,), (4,))]
    heights = {(0,): 28.0, (1,): 28.0, (2,): 40.0, (3,): 60.0, (4,): 28.0}
    ys = level_links(columns, links, shifts=dict.fromkeys(links, 0.0), heights=heights)
    assert ys[2,] - ys[0,] == pytest.approx(0)
    assert ys[3,] - ys[1,] == pytest.approx(0)
    assert ys[3,] - ys[2,] == pytest.approx(ITEM_GAP + 50)
    assert ys[4,] == pytest.approx((ys[2,] + ys[3,]) / 2)


def test_links_level_with_where_they_end() -> None:
    columns: list[list[Item]] = [[(0,), (1,)], [(2,)]]
    links: list[Link] = [((0,), (2,)), ((1,), (2,))]
    shifts = {links[0]: -30.0, links[1]: 30.0}
    ys = level_links(columns, links, shifts=shifts, heights=dict.fromkeys([(0,), (1,), (2,)], 20.0))
    assert ys[0,] == pytest.approx(ys[2,] - 30)
    assert ys[1,] == pytest.approx(ys[2,] + 30)
