import dataclasses
import json

import pytest

from dnas_ens.commands.options import EarlyOptions
from dnas_ens.commands.whole_way import WholeWayCommand
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.errors import UserError


def write(tmp_path, values):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(values))
    return str(path)


def test_flags_beat_the_file_and_the_file_beats_the_preset(tmp_path):
    file = write(
        tmp_path, {"search": {"preset": "micro", "supernet": {"channels": 5}}, "retrain": {"epochs": 2}}
    )
    search, recipe = EarlyOptions.read(["--config", file, "--seed", "3"]).defaults()
    assert (search.preset, search.supernet.channels, search.bilevel.epochs) == ("micro", 5, 6)
    assert (recipe.epochs, recipe.channels) == (2, 8)
    search, recipe = EarlyOptions.read(["--preset=smoke", f"--config={file}"]).defaults()
    assert (search.preset, search.supernet.channels, search.bilevel.epochs) == ("smoke", 5, 20)
    assert recipe.channels == 16
    assert EarlyOptions.read(["--config", file, "--seed", "3"]).rest == ["--seed", "3"]


def test_a_given_base_beats_the_files(tmp_path):
    file = write(tmp_path, {"search": {"regime": "hypernet", "hypernetwork": {"base": "theirs.json"}}})
    search, _ = EarlyOptions.read(["--config", file]).defaults()
    assert (search.regime, str(search.hypernetwork.base)) == ("hypernet", "theirs.json")
    search, _ = EarlyOptions.read(["--config", file, "--base", "mine.json"]).defaults()
    assert str(search.hypernetwork.base) == "mine.json"


def test_a_file_of_one_section_is_read_as_such(tmp_path):
    file = write(tmp_path, {"bilevel": {"epochs": 7}})
    search, _ = EarlyOptions.read(["--config", file]).defaults(section="search")
    assert search.bilevel.epochs == 7
    with pytest.raises(UserError, match="parts other than search and retrain"):
        EarlyOptions.read(["--config", file]).defaults()
    with pytest.raises(UserError, match="no object"):
        EarlyOptions.read(["--config", write(tmp_path, {"search": 3})]).defaults()


def test_published_regimes_do_without_this_projects_terms():
    for regime in ("optimal", "js"):
        search, _ = EarlyOptions.read(["--regime", regime]).defaults()
        assert search.objective.commitment == (0.0, 0.0)
        assert search.objective.operation_balance == (0.0, 0.0)
    search, _ = EarlyOptions.read([]).defaults()
    assert search.objective.commitment[1] > 0
    assert search.objective.operation_balance[1] > 0


def test_the_whole_way_refuses_a_supernet_without_the_cells_the_networks_need():
    search, recipe = search_preset(), retrain_preset()
    one = dataclasses.replace(search, supernet=dataclasses.replace(search.supernet, num_cells=1))
    with pytest.raises(UserError, match="1 cell finds no normal cell, which a network of 3 cells has"):
        WholeWayCommand(search=one, retrain=recipe)
    WholeWayCommand(search=one, retrain=dataclasses.replace(recipe, num_cells=1))
    WholeWayCommand(search=search, retrain=dataclasses.replace(recipe, num_cells=20))
