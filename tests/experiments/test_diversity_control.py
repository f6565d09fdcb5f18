import diversity_control
import pytest

from dnas_ens.data import load_data
from dnas_ens.errors import UserError

STAR, HYPERNET = "js-pairwise, R=1", "edge-overlap (EdgeNES v2), R=1"


def test_study_writes_table_and_plot_and_goes_on_where_it_stopped(tmp_path, run_here, read_lines, narrow, monkeypatch):
    monkeypatch.setattr(diversity_control, "load_data", lambda name: load_data(name, limit_train=96))
    output = tmp_path / "control"
    rest = ("--epochs", "3", "--seeds", "1", "--output", output)
    with narrow(diversity_control):
        run_here("diversity_control", "--settings", STAR, *rest)
        run_here("diversity_control", "--settings", STAR, HYPERNET, *rest)
    first, second = read_lines(tmp_path / "control.jsonl")
    assert [first["setting"], second["setting"]] == [STAR, HYPERNET]
    assert len(first["lam"]) == len(first["distance"][0]) == len(first["shared"][0]) == 21
    assert (first["distance"][0][0], first["shared"][0][0]) == (0.0, 16)
    errors = [abs(d - x) for d, x in zip(first["distance"][0], first["lam"], strict=True) if x <= 0.7]
    assert abs(first["tracking_error"] - sum(errors) / len(errors)) < 1e-9
    # The folder of the given base belongs to this machine, not to the result.
    assert second["config"]["hypernetwork"]["base"] == "optimal-0-3-epochs.json"
    assert f"{first['tracking_error']:.3f}" in (tmp_path / "control.md").read_text()
    assert (tmp_path / "control.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="with other settings"):
        run_here("diversity_control", "--settings", STAR, "--epochs", "4", *rest[2:])


def test_table_is_mean_and_deviation_over_seeds():
    plain = {"setting": "none, R=4", "between_over_lambda": None}
    runs = [
        {**dict.fromkeys(diversity_control.COLUMNS, value), **plain, "seed": seed}
        for seed, value in ((0, 1.0), (1, 2.0), (2, 3.0), (5, 7.0), (6, 9.0))
    ]
    row, fresh = diversity_control.table(runs).splitlines()[2:]
    assert row.startswith("| none, R=4 | 3 | 2.000 ± 1.000 |")
    assert "|  |" in row
    assert fresh.startswith("| none, R=4, fresh seeds | 2 | 8.000 ± 1.414 |")
