from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sample_config import Bilevel, Search

from dnas_ens.config.file import override
from dnas_ens.errors import UserError


def test_what_is_named_is_replaced() -> None:
    default = Search(seed=4, bilevel=Bilevel(second_order=True))
    values = {
        "bilevel": {"epochs": 9, "temperature": [2, 1.5]},
        "data_root": "x/y",
        "limit": None,
        "operations": ["a", "b"],
        "pairs": [["a", 1], ["b", 2]],
        "penalty": "none",
    }
    loaded = override(default, values)
    assert loaded == Search(
        seed=4,
        data_root=Path("x/y"),
        operations=("a", "b"),
        pairs=(("a", 1), ("b", 2)),
        penalty="none",
        bilevel=Bilevel(epochs=9, temperature=(2.0, 1.5), second_order=True),
    )
    # 2 reads as 2.0 where a number with decimals is meant, so that the stored configuration is the same.
    assert [type(value) for value in loaded.bilevel.temperature] == [float, float]
    assert default == Search(seed=4, bilevel=Bilevel(second_order=True))
    assert override(default, {}) == default


@pytest.mark.parametrize(
    ("values", "cause", "remedy"),
    [
        ({"sed": 1}, "Unknown field sed in", "Did you mean seed?"),
        ({"bilevel": {"epoch": 1}}, "Unknown field bilevel.epoch in", "Did you mean bilevel.epochs?"),
        ({"epochs": 1}, "Unknown field epochs in", "Did you mean bilevel.epochs?"),
        ({"xyzzy": 1}, "Unknown field xyzzy in", "There are seed, batch_size,"),
        ({"seed": "x"}, 'seed is "x" in', "Make it a whole number."),
        ({"seed": 1.5}, "seed is 1.5 in", "Make it a whole number."),
        ({"seed": True}, "seed is true in", "Make it a whole number."),
        ({"seed": None}, "seed is null in", "Make it a whole number."),
        ({"limit": "x"}, 'limit is "x" in', "Make it a whole number or null."),
        ({"data_root": 3}, "data_root is 3 in", "Make it a path or null."),
        ({"penalty": "jss"}, 'penalty is "jss" in', 'Make it one of "js", "none".'),
        ({"nodes": True}, "nodes is true in", "Make it one of 1, 4."),
        ({"operations": "skip"}, 'operations is "skip" in', "Make it a list, each item a string."),
        ({"operations": ["a", 1]}, "operations[1] is 1 in", "Make it a string."),
        ({"pairs": [["a"]]}, 'pairs[0] is ["a"] in', "Make it a list of 2: a string, a whole number."),
        ({"bilevel": 3}, "bilevel is 3 in", "Make it an object of fields."),
        ({"bilevel": {"second_order": 1}}, "bilevel.second_order is 1 in", "Make it true or false."),
        ({"bilevel": {"learning_rate": "x"}}, 'bilevel.learning_rate is "x" in', "Make it a number."),
        ({"bilevel": {"learning_rate": True}}, "bilevel.learning_rate is true in", "Make it a number."),
        ({"bilevel": {"temperature": [1]}}, "bilevel.temperature is [1] in", "Make it a list of 2: a number"),
        ({"bilevel": {"epochs": 0}}, "--epochs is 0.", "Give --epochs 1 or more."),
        ([1], "the whole is [1] in", "Make it an object of fields."),
    ],
)
def test_a_field_that_does_not_fit_is_named(values: Any, cause: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        override(Search(), values, source="a.json")
    said = caught.value
    assert "\n" not in said.cause + said.remedy
    assert said.cause.startswith(cause)
    assert said.remedy.startswith(remedy)
    assert said.cause.endswith((" in a.json.", "--epochs is 0."))


def test_importing_does_not_import_torch() -> None:
    script = "import sys, dnas_ens.config.file; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
