import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dnas_ens.commands.evaluate import report_main as main
from dnas_ens.commands.parse import run_main
from dnas_ens.errors import UserError
from dnas_ens.evaluate.predictions import source_of
from dnas_ens.evaluate.tables import result_rows
from dnas_ens.figures.cells import save_cells
from dnas_ens.report import write_report
from dnas_ens.report.architectures import steering_section
from dnas_ens.report.run_files import RunFiles
from dnas_ens.run.files import read_json, write_json
from dnas_ens.space.genotype import Genotype

VOID = {"meta", "br", "hr", "img", "link", "input", "col"}


class Page(HTMLParser):
    """The page's elements, in order, with what is wrong about them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.faults, self.headings, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        self.faults += [f"{tag} is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        if len(dict(attrs)) < len(attrs):
            self.faults.append(f"{tag} has an attribute twice")
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append([int(tag[1]), ""])

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.faults.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        self.text += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings[-1][1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def titles(self):
        return [title for level, title in self.headings if level == 2]


def check(page, source):
    assert not page.faults
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    # Everything that refers to an identifier finds it.
    referred = re.findall(r"url\(#([^)]+)\)", source)
    for tag, attributes in page.elements:
        if "href" in attributes and not attributes["href"].startswith("data:image/png;base64,"):
            assert attributes["href"].startswith("#"), (tag, attributes)
            referred.append(attributes["href"][1:])
        referred += attributes.get("aria-labelledby", "").split()
        assert not [name for name in attributes if name.startswith("on") or name == "src"], (tag, attributes)
    assert set(referred) <= set(ids)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object"}
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert not re.search(r"@import|url\((?!#)", source)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", source)
    for picture in page.all("svg"):
        assert picture["role"] == "img"
        assert picture.get("aria-label") or picture["aria-labelledby"]
    levels = [level for level, title in page.headings if title.strip()]
    assert (levels[0], levels.count(1), len(levels)) == (1, 1, len(page.headings))
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def read(folder):
    source = write_report(folder).read_text("utf-8")
    page = Page(source)
    check(page, source)
    return page, source


def test_whole_report(make_run, predictions):
    folder = make_run(predictions(3, 90, 4), channels=3, comparison=True, shift=True)
    page, _ = read(folder)
    headline = "Three different networks together classify [0-9.]+\u202f% of 90 test images of tiles right."
    assert re.fullmatch(headline, page.headings[0][1])
    assert len(page.titles()) == 11
    assert "a <rival> & co" in page.text  # escaped in the source, read back as it was
    # Corruptions made here and the public ones are not averaged together.
    assert "Mean over five corruptions." in page.text
    assert "Mean over two corruptions of the public CIFAR-10-C." in page.text
    assert "took 27\u202fs of CPU time, 12\u202fs of it for the search" in page.text
    # It says that it loses.
    assert "comes second in calibrated NLL" in page.text

    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert names == {path.stem for path in (folder / "figures").glob("*.png")}
    expected = "reliability-ensemble disagreement predictions-tsne risk-coverage nll-by-cost corruption-each diversity"
    assert set(expected.split()) < names
    events = EventAccumulator(str(folder / "tensorboard/report"))
    events.Reload()
    assert set(events.Tags()["images"]) == {f"report/{name}" for name in names}


def test_of_a_budget_each_network_is_told_its_own_cell_and_nothing_that_was_not_done(make_run, predictions):
    folder = make_run(predictions(3, 40, 4))
    ensemble = read_json(folder / "ensemble.json")
    # Copies of the last cell, and then the first one.
    ensemble["members"] = [ensemble["members"][index] for index in (2, 2, 0)]
    write_json(folder / "ensemble.json", ensemble)
    search = {"supernet": {"num_cells": 3, "channels": None, "space": "efficient"}, "bilevel": {"epochs": 12}}
    recipe = {"num_cells": 3, "channels": 8, "epochs": 100, "batch_size": 64, "learning_rate": 0.05, "seed": 0}
    config = {**read_json(folder / "config.json"), "retrain": {**recipe, "cycles": 2, "cycle_epochs": 5}}
    config["search"] |= search
    write_json(folder / "config.json", config)
    page, _ = read(folder)
    assert re.findall(r"λ = ([0-9.]+) in direction", page.text) == ["0.50", "0.50", "0.00"]
    assert "3 cells, 16 channels; 12 epochs" in page.text
    assert "3 cells, 8 channels; 100 epochs from scratch, 2 cycles of 5" in page.text
    # Planned for 98,765 epochs, trained for 3.
    unit = {"kind": "first", "epochs": 98765, "number": 0, "cell": 0}
    done = {"unit": unit, "epochs": 3, "cost": 3.0, "at": 3.0, "loss": 0.5, "alone": 0.5, "members": [0]}
    budget = {"budget": {"total": 3.0, "unit": "epochs"}, "channels": 32, "done": [done]}
    write_json(folder / "budget.json", budget)
    page, _ = read(folder)
    assert "3 cells, 32 channels; epochs as the budget chose" in page.text
    assert "12 epochs" not in page.text
    assert "98765" not in page.text
    # Its networks are drawn, and not those of the search, of which there may have been more.
    for index, member in enumerate(ensemble["members"]):
        save_cells(Genotype.from_dict(member["spec"]["genotype"]), folder / "drawn.svg", title=f"Member {index}")
        assert (folder / f"cells/member-{index}.svg").read_bytes() == (folder / "drawn.svg").read_bytes()
    write_json(folder / "ensemble.json", {**ensemble, "members": ensemble["members"][:2]})
    read(folder)
    assert {path.name for path in (folder / "cells").glob("member-*")} == {"member-0.svg", "member-1.svg"}


@pytest.mark.parametrize(
    ("given", "heading", "said", "unsaid"),
    [
        # No better than a constant answer: warned of in the lead and in the section on classes.
        ((2, 40, 3, -9.0), "Two ", ["no better than that constant answer"] * 2, []),
        ((1, 40, 2, 2.5), "One network ", [], ["How many members does it take?", "average member"]),
        ((2, 1, 2, 20.0), "Two .* 100.0\u202f% of 1 test image of tiles", ["resampling says nothing"], []),
    ],
)
def test_small_and_bad_ensembles(make_run, predictions, given, heading, said, unsaid):
    *sizes, sharpness = given
    page, _ = read(make_run(predictions(*sizes, sharpness=sharpness)))
    assert re.match(heading, page.headings[0][1])
    assert all(page.text.count(text) == said.count(text) for text in said)
    assert not any(text in page.text for text in unsaid)


def test_what_a_run_was_before_it_grew_is_not_mixed_with_what_it_is(make_run, predictions):
    given = predictions(3, 10, 3)
    folder = make_run(given)
    # As many rows as of two members and of what was distilled from them.
    rows = result_rows(given.of_members([0, 1]))
    write_json(folder / "results.json", [*rows[:-1], {**rows[-1], "name": "distilled"}, rows[-1]])
    assert [row["name"] for row in RunFiles.load(folder).rows] == [row["name"] for row in result_rows(given)]
    # A network that an ensemble had before it shrank is no cost of it.
    ensemble = read_json(folder / "ensemble.json")
    write_json(folder / "ensemble.json", {**ensemble, "members": ensemble["members"][:2]})
    assert RunFiles.load(folder).seconds() == (12.0, 10.0, "CPU")
    # What was measured under shift, and compared, is told of the ensemble that it is of.
    folder = make_run(given, comparison=True, shift=True)
    write_json(folder / "splits.json", {"fingerprint": "0123456789abcdef"})
    source = source_of(folder, "0123456789abcdef")
    replace(given, source=source).save(folder / "predictions.npz")
    for of, there in ((source, True), ("an earlier one", False)):
        for name in ("shift.json", "comparison.json"):
            write_json(folder / name, {**read_json(folder / name), "source": of})
        files = RunFiles.load(folder)
        assert (bool(files.corruptions), bool(files.comparison)) == (there, there)
    replace(given, source="of an earlier ensemble").save(folder / "predictions.npz")
    with pytest.raises(UserError, match="has changed since it was evaluated"):
        write_report(folder)


def test_mistakes_are_told(tmp_path, make_run, predictions):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    folder = make_run(predictions(2, 10, 3))
    write_json(folder / "comparison.json", {"rows": [{"name": "ours"}]})
    with pytest.raises(UserError, match="has no 'accuracy'"):
        write_report(folder)
    write_json(folder / "comparison.json", "nothing")
    with pytest.raises(UserError, match=r"comparison\.json: it is not an object"):
        write_report(folder)


def test_confusions_with_hostile_names_and_seconds_of_a_gpu(make_run, predictions):
    names = ["<script>alert(1)</script>", "a\"b'c & $d$", "犬 $\\frac$", "e"]
    given = replace(predictions(2, 40, 4), classes=names)
    folder = make_run(given, data="</title><img src=x onerror=y>")
    for path in folder.glob("members/*/member.json"):
        write_json(path, {**read_json(path), "gpu_seconds": 2.0})
    page, source = read(folder)
    assert not re.search("<script|<img", source)
    assert "犬" in page.text
    assert "took 4\u202fs of GPU time, 0\u202fs of it for the search" in page.text
    rows = re.findall(r'<th scope="row">[^<]*</th>((?:<td>\d*</td>){4})', source[source.index("Confusion matrix") :])
    cells = [[int(cell or 0) for cell in re.findall(r"<td>(\d*)</td>", row)] for row in rows]
    assert cells == confusion_matrix(given.test_labels, given.averaged()[1].argmax(axis=1)).tolist()


@pytest.mark.parametrize(("penalty", "asked"), [("js-pairwise", True), ("edge-overlap", False)])
def test_a_diagonal_is_drawn_where_a_distance_was_asked_for(make_run, predictions, penalty, asked):
    folder = make_run(predictions(2, 10, 3), evaluated=False)
    config = read_json(folder / "config.json")
    config["search"]["objective"] = {"penalty": penalty}
    write_json(folder / "config.json", config)
    steering = steering_section(RunFiles.load(folder))
    assert ("dashed diagonal" in steering.pictures[0].caption) == asked
    assert any(line.get_gid() == "diagonal" for line in steering.pictures[0].figure.axes[0].lines) == asked
    assert ("how far from it each should lie" in steering.text) == asked


def test_search_alone_by_the_command(make_run, predictions, capsys):
    folder = make_run(predictions(2, 10, 3), evaluated=False)
    page, source = read(folder)
    assert page.headings[0][1] == "Two networks found for tiles, not trained yet."
    assert len(page.titles()) == 3
    # Written again it is the same, and the earlier images are replaced.
    assert run_main(main, [str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder}/report.html\n"
    assert (folder / "report.html").read_text("utf-8") == source
    assert len(list((folder / "tensorboard/report").iterdir())) == 1


@pytest.mark.parametrize(("evaluated", "said"), [(True, "The members, trained"), (False, "The candidates, with the")])
def test_the_front_of_step_times_is_of_trained_members_or_else_of_candidates(make_run, predictions, evaluated, said):
    folder = make_run(predictions(3, 40, 3), evaluated=evaluated)
    found = read_json(folder / "genotypes.json")
    for index, candidate in enumerate(found["candidates"]):
        candidate |= {"expected_step_ms": 20.0 + index, "supernet_val_nll": 2.0 - index}
    write_json(folder / "genotypes.json", found)
    page, _ = read(folder)
    assert "What does a step cost?" in page.titles()
    assert said in page.text
    assert (folder / "figures/step-time.svg").exists()
    # Candidates that were not scored have no place on it.
    for candidate in found["candidates"]:
        candidate["supernet_val_nll"] = None
    write_json(folder / "genotypes.json", found)
    assert ("What does a step cost?" in read(folder)[0].titles()) is evaluated
