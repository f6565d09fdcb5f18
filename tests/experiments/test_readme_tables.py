import json

import pytest
from readme_tables import ROOT, filled, main, tables

from dnas_ens.errors import UserError

TEXT = """# Results

| | accuracy % | note |
|:--|--:|:--|
| ours | 98.5 | one |
| -- | 97.0 | two |

Words.

| seeds | gain |
|--:|--:|
| 3 | -0.1 to 0.2 |
"""


@pytest.fixture
def results(tmp_path):
    (tmp_path / "study.md").write_text(TEXT)
    return tmp_path


def marker(**asked):
    return f"<!-- table {json.dumps(asked)} -->\n"


def test_the_tables_of_a_text():
    assert tables(TEXT) == [
        [["", "accuracy %", "note"], ["ours", "98.5", "one"], ["--", "97.0", "two"]],
        [["seeds", "gain"], ["3", "-0.1 to 0.2"]],
    ]


def test_a_marked_table_is_replaced_and_the_rest_kept(results):
    mark = marker(file="study.md", number=1, columns=["note", "accuracy %"])
    text = f"before\n{mark}| old |\n<!-- end of table -->\nafter {marker(file='gone.md')}"
    table = "| note | accuracy % |\n| :-- | --: |\n| one | 98.5 |\n| two | 97.0 |\n"
    expected = f"before\n{mark}{table}<!-- end of table -->\nafter {marker(file='gone.md')}"
    assert filled(text, results) == expected
    assert filled(expected, results) == expected
    second = filled(f"{marker(file='study.md', number=2)}<!-- end of table -->", results)
    assert "| 3 | -0.1 to 0.2 |" in second


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"file": "gone.md"}, "There is no"),
        ({"file": "study.md", "number": 3}, "2 tables, not 3"),
        ({"file": "study.md", "columns": ["cost"]}, "no column 'cost'"),
        ({"number": 1}, "cannot be read"),
    ],
)
def test_what_a_marker_may_not_say(results, asked, message):
    with pytest.raises(UserError, match=message):
        filled(marker(**asked) + "<!-- end of table -->", results)


def test_the_command(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(marker(file="study.md") + "old\n<!-- end of table -->\n")
    options = ["--readme", str(readme), "--results", str(results)]
    with pytest.raises(UserError, match="not what their files say"):
        main([*options, "--check"])
    main(options)
    assert "| ours | 98.5 | one |" in readme.read_text()
    main([*options, "--check"])
    assert "README.md: 1" in capsys.readouterr().out


def test_the_readme_says_what_the_files_say():
    main(["--check"])
    assert "<!-- table" in (ROOT / "README.md").read_text()
