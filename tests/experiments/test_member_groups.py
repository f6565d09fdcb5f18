import itertools

import numpy as np
import pytest
from studies.loss_landscape.member_groups import contrast_pairs, pair_values


def distances(points):
    return np.linalg.norm(points[:, None] - points[None, :], axis=-1)


def exact_p_value(matrix, groups):
    """Over all orders of the groups, which is what random ones sample."""
    rows, columns = np.triu_indices(len(groups), k=1)

    def difference(of_members):
        same = np.array([of_members[i] == of_members[j] for i, j in zip(rows, columns, strict=True)])
        return matrix[rows, columns][~same].mean() - matrix[rows, columns][same].mean()

    observed = abs(difference(groups)) - 1e-9
    drawn = [abs(difference(order)) >= observed for order in itertools.permutations(groups)]
    return np.mean(drawn)


def test_means_by_hand_and_exact_p_value():
    matrix = np.array([[0, 1, 5, 6], [1, 0, 7, 8], [5, 7, 0, 3], [6, 8, 3, 0]], dtype=float)
    found = contrast_pairs(matrix, ["a", "a", "b", "b"])
    assert (found.within, found.between, found.difference) == (2.0, 6.5, 4.5)
    assert found.num_groupings == 3
    assert found.p_value == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("groups", ["aabbcc", "aaabbc", "abcabc"])
def test_p_value_is_that_of_all_permutations(groups):
    points = np.random.default_rng(3).normal(size=(6, 2))
    matrix = distances(points)
    found = contrast_pairs(matrix, groups)
    assert found.p_value == pytest.approx(exact_p_value(matrix, groups), abs=0.02)


def test_number_of_groupings():
    matrix = distances(np.random.default_rng(0).normal(size=(6, 2)))
    # 6! / (2! 2! 2!) / 3! and 6! / (3! 2! 1!).
    assert contrast_pairs(matrix, "aabbcc", num_resamples=1).num_groupings == 15
    assert contrast_pairs(matrix, "aaabbc", num_resamples=1).num_groupings == 60


def test_groups_that_are_apart_are_found_and_others_at_their_level():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(4), 3)
    apart = distances(generator.normal(size=(12, 3)) + 3 * generator.normal(size=(4, 3))[groups])
    assert contrast_pairs(apart, groups.tolist()).p_value < 0.01
    # Without an effect, one p-value in ten is below 0.1; 200 of them, four standard errors.
    below = [
        contrast_pairs(distances(generator.normal(size=(12, 3))), groups.tolist(), num_resamples=199).p_value
        <= 0.1
        for _ in range(200)
    ]
    assert np.mean(below) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 200))


def test_pairs_of_both_kinds():
    matrix = np.arange(9).reshape(3, 3)
    within, between = pair_values(matrix, ["a", "b", "a"])
    assert within.tolist() == [2]
    assert between.tolist() == [1, 5]


def test_refuses_what_does_not_fit():
    matrix = distances(np.arange(6.0).reshape(3, 2))
    for wrong, groups, message in (
        (matrix[:2], "aab", "matrix of that side"),
        (np.triu(matrix), "aab", "symmetric"),
        (matrix * np.nan, "aab", "finite"),
        (matrix, "aaa", "pairs between groups"),
        (matrix, "abc", "pairs within"),
    ):
        with pytest.raises(ValueError, match=message):
            contrast_pairs(wrong, list(groups))
