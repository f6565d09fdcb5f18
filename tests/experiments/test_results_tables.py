import json

import pytest
from results_tables import PAGES, filled, main

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


def test_a_marked_table_is_replaced_and_the_rest_kept(results):
    mark = marker(file="study.md", number=1, columns=["note", "accuracy %"])
    text = f"before\n{mark}| old |\n<!-- end of table -->\nafter {marker(file='gone.md')}"
    table = "| note | accuracy % |\n| :-- | --: |\n| one | 98.5 |\n| two | 97.0 |\n"
    expected = f"before\n{mark}{table}<!-- end of table -->\nafter {marker(file='gone.md')}"
    assert filled(text, results) == expected
    assert filled(expected, results) == expected
    second = filled(f"{marker(file='study.md', number=2)}<!-- end of table -->", results)
    assert "| 3 | -0.1 to 0.2 |" in second
    rows = filled(f"{marker(file='study.md', rows=['--', 'ours'])}<!-- end of table -->", results)
    assert "| -- | 97.0 | two |\n| ours | 98.5 | one |\n" in rows


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"file": "gone.md"}, "There is no"),
        ({"file": "study.md", "number": 3}, "2 tables, not 3"),
        ({"file": "study.md", "columns": ["cost"]}, "no column 'cost'"),
        ({"file": "study.md", "rows": ["theirs"]}, "no row 'theirs'"),
        ({"number": 1}, "cannot be read"),
    ],
)
def test_what_a_marker_may_not_say(results, asked, message):
    with pytest.raises(UserError, match=message):
        filled(marker(**asked) + "<!-- end of table -->", results)


def test_the_command(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(marker(file="study.md") + "old\n<!-- end of table -->\n")
    options = ["--pages", str(page), "--results", str(results)]
    with pytest.raises(UserError, match="not what their files say"):
        main([*options, "--check"])
    main(options)
    assert "| ours | 98.5 | one |" in page.read_text()
    main([*options, "--check"])
    assert "page.md: 1" in capsys.readouterr().out


def test_the_pages_say_what_the_files_say():
    main(["--check"])
    for page in PAGES:
        assert "<!-- table" in page.read_text()
