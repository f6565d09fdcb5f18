import json

import pytest

from dnas_ens.commands.options import configured
from dnas_ens.commands.whole_way import WholeWayCommand
from dnas_ens.config.fields import to_dict, with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.errors import UserError


@pytest.fixture
def configure(tmp_path):
    def call(argv="", values=None, **options):
        """Configuration of a command line and the content of its --config file."""
        if values is not None:
            (tmp_path / "settings.json").write_text(json.dumps(values))
            argv = f"{argv} --config {tmp_path / 'settings.json'}"
        return configured(argv.split(), prog="python -m dnas_ens", **options)

    return call


def test_flags_beat_the_file_and_the_file_beats_the_preset(configure):
    file = {"search": {"preset": "micro", "supernet": {"channels": 5}}, "retrain": {"epochs": 2}}
    search, recipe = configure("--seed 3", file)
    assert (search.preset, search.supernet.channels, search.bilevel.epochs) == ("micro", 5, 6)
    assert (recipe.epochs, recipe.channels) == (2, 16)
    assert configure("--space darts", file)[1].channels == 8
    # The space sets the search's defaults too, as in a Python call.
    in_darts = search_preset("micro", space="darts")
    for call in (
        ("--preset micro --space darts", {}),
        ("--preset micro", {"search": {"supernet": {"space": "darts"}}}),
    ):
        assert configure(*call)[0] == in_darts
    assert in_darts.objective.relaxation != search.objective.relaxation
    search, recipe = configure("--preset=smoke", file)
    assert (search.preset, search.supernet.channels, search.bilevel.epochs) == ("smoke", 5, 12)
    assert recipe.channels == 16
    # Beside all settings of a run it would change the label alone.
    for typed in ("--preset smoke", "--regime js"):
        with pytest.raises(UserError, match=f"{typed.replace(' ', ' is ')}, but"):
            configure(typed, {"search": to_dict(search_preset("micro"))})
    file = {"search": {"regime": "hypernet", "hypernetwork": {"base": "theirs.json"}}}
    search, _ = configure("", file)
    assert (search.regime, str(search.hypernetwork.base)) == ("hypernet", "theirs.json")
    search, _ = configure("--base mine.json", file)
    assert str(search.hypernetwork.base) == "mine.json"


def test_a_preset_limits_its_own_data_set_alone(configure):
    named = {"search": {"data": {"data": "photos"}}}
    for argv, values, limit in (
        ("--preset micro", {}, 10_000),
        ("--preset micro --data fashion-mnist", {}, 10_000),
        ("--preset micro --data photos", {}, None),
        ("--preset micro", named, None),
        ("--preset micro", {"search": {"data": {"data": "photos", "limit_train": 7}}}, 7),
    ):
        assert configure(argv, values)[0].data.limit_train == limit


def test_a_file_of_one_section_is_read_as_such(configure):
    file = {"bilevel": {"epochs": 7}}
    assert configure("", file, section="search")[0].bilevel.epochs == 7
    with pytest.raises(UserError, match="parts other than search and retrain"):
        configure("", file)
    with pytest.raises(UserError, match="not an object"):
        configure("", {"search": 3})
    for name, value in (("preset", []), ("regime", {}), ("hypernetwork", {"base": 5}), ("supernet", {"space": {}})):
        with pytest.raises(UserError, match=r"(preset|regime|base|space) in .*settings\.json is no text"):
            configure("", {"search": {name: value}})


def test_the_whole_way_refuses_a_supernet_without_the_cells_the_networks_need():
    one, recipe = with_fields(search_preset(), num_cells=1), retrain_preset()
    with pytest.raises(UserError, match="1 cell finds no normal cell, which a network of 3 cells has"):
        WholeWayCommand(search=one, retrain=recipe)
    WholeWayCommand(search=one, retrain=with_fields(recipe, num_cells=1))
