from contextlib import contextmanager

import pytest

from dnas_ens.training.interleaving import exhaust, in_turns


def counting(name, count, log):
    for number in range(count):
        log.append((name, number))
        yield
    return f"{name} done"


def test_exhaust_does_all_and_returns_the_result():
    log = []
    assert exhaust(counting("a", 3, log)) == "a done"
    assert log == [("a", 0), ("a", 1), ("a", 2)]


def test_turns_alternate_until_the_last_is_done():
    log, entered = [], []

    @contextmanager
    def context(index):
        entered.append(index)
        yield

    works = [counting(name, count, log) for name, count in (("a", 1), ("b", 3), ("c", 2))]
    assert in_turns(works, context=context) == ["a done", "b done", "c done"]
    assert log == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("b", 2)]
    # Two steps and the end of c, say.
    assert [entered.count(index) for index in range(3)] == [2, 4, 3]


def test_an_error_ends_the_others():
    closed = []

    def endless():
        try:
            while True:
                yield
        finally:
            closed.append(True)

    def failing():
        yield
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        in_turns([endless(), failing(), endless()])
    assert closed == [True, True]
