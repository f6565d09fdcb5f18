from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.transforms import Bbox

from dnas_ens.figures.cells import (
    draw_genotype,
    operation_colour,
    save_cells,
)
from dnas_ens.figures.style import to_svg
from dnas_ens.space.genotype import Genotype, random_genotype

OPERATIONS = (
    *("max_pool_3x3", "avg_pool_3x3", "skip_connect"),
    *("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
)
LONG_NAME = "a_custom_operation_of_a_very_long_name_9x9"


def operation(number: int) -> str:
    return OPERATIONS[number % len(OPERATIONS)]


CASES = {
    "all inputs": Genotype(normal=tuple(((operation(n), 0), (operation(n + 4), 1)) for n in range(4))),
    "chain": Genotype(reduction=tuple(((operation(n + 3), 0), (operation(n), n + 1)) for n in range(4))),
    "single edges": Genotype(normal=tuple(((operation(n), n and n + 1),) for n in range(4))),
    "every edge": Genotype(reduction=tuple(tuple((operation(n + s), s) for s in range(n + 2)) for n in range(4))),
    "one node": Genotype(normal=((("skip_connect", 1),),)),
    "long name": Genotype(normal=(((LONG_NAME, 0), ("none", 1)),) * 2),
    "six nodes": random_genotype(np.random.default_rng(3), operations=OPERATIONS, num_nodes=6),
    **{f"random {seed}": random_genotype(np.random.default_rng(seed), operations=OPERATIONS) for seed in range(3)},
}
every_case = pytest.mark.parametrize("genotype", CASES.values(), ids=CASES.keys())


def as_read(name: str) -> str:
    for side in "359":
        name = name.replace(f"{side}x{side}", f"{side}×{side}")
    return name.replace("_", " ")


def cell_axis(genotype: Genotype, cell_type: str) -> Axes:
    return draw_genotype(genotype).axes[genotype.cell_types.index(cell_type)]


def svg_texts(svg: str) -> dict[str, str]:
    """Return the text drawn in each named group of an SVG: matplotlib writes it as a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg, parser=parser)
    texts = {}
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        comments = [child.text for child in group if child.tag is ElementTree.Comment]
        if comments:
            texts[group.attrib["id"]] = (comments[0] or "").strip()
    return texts


def apart(one: Bbox, other: Bbox, margin: float) -> bool:
    return not one.padded(margin).overlaps(other)


def contains(outer: Bbox, inner: Bbox) -> bool:
    return bool(outer.x0 <= inner.x0 and outer.y0 <= inner.y0 and inner.x1 <= outer.x1 and inner.y1 <= outer.y1)


def assert_nothing_overlaps(figure: Figure, *, point: float = 100 / 72) -> None:
    """Check, on what the renderer measures, that texts, boxes and lines keep off each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = {
        text.get_gid() or "heading": text.get_window_extent(renderer)
        for holder in (figure, *figure.axes)
        for text in holder.texts
    }
    patches = [patch for axis in figure.axes for patch in axis.patches]
    boxes = [patch.get_window_extent(renderer) for patch in patches if isinstance(patch, FancyBboxPatch)]
    for name, text in texts.items():
        assert contains(figure.bbox, text), name
    for (name, text), (other_name, other) in combinations(texts.items(), 2):
        assert apart(text, other, 3 * point), (name, other_name)
    for one, other in combinations(boxes, 2):
        assert apart(one, other, 3 * point)
    for name, text in texts.items():
        holders = [box for box in boxes if contains(box.padded(-2 * point), text)]
        touched = [box for box in boxes if not apart(box, text, 0)]
        inside = "-edge-" in name or "-node-" in name
        assert len(holders) == len(touched) == inside, name
    lines = [patch for patch in patches if isinstance(patch, PathPatch)]
    assert lines
    for line in lines:
        outline = line.get_transform().transform_path(line.get_path()).interpolated(1)
        x, y = np.concatenate(
            [
                start + (end - start) * np.linspace(0, 1, 50)[:, None]
                for polygon in outline.to_polygons(closed_only=False)
                for start, end in pairwise(polygon)
            ]
        ).T
        for area in (*texts.values(), *(box.padded(-point) for box in boxes)):
            assert not ((area.x0 < x) & (x < area.x1) & (area.y0 < y) & (y < area.y1)).any()


@every_case
def test_svg_names_every_operation_and_node(genotype: Genotype) -> None:
    texts = svg_texts(to_svg(draw_genotype(genotype)))
    expected = {}
    for cell_type in genotype.cell_types:
        expected[f"{cell_type}-title"] = f"{cell_type.capitalize()} cell"
        expected[f"{cell_type}-concat"] = "concat"
        expected[f"{cell_type}-node-0"] = "$c_{k-2}$"
        expected[f"{cell_type}-node-1"] = "$c_{k-1}$"
        expected[f"{cell_type}-node-{genotype.num_nodes + 2}"] = "$c_k$"
        for index, node in enumerate(genotype.cell(cell_type)):
            expected[f"{cell_type}-node-{index + 2}"] = str(index)
            for name, source in node:
                expected[f"{cell_type}-edge-{source}-{index + 2}"] = as_read(name)
    assert texts == expected


@every_case
def test_nothing_overlaps(genotype: Genotype) -> None:
    assert_nothing_overlaps(draw_genotype(genotype, title="Member 3: λ = 0.50, direction 2"))


def test_overlaps_are_found_when_there_are_some() -> None:
    figure = draw_genotype(CASES["chain"])
    labels = [text for text in figure.axes[0].texts if "-edge-" in str(text.get_gid())]
    labels[0].set_position(labels[1].get_position())
    with pytest.raises(AssertionError):
        assert_nothing_overlaps(figure)


def test_each_operation_stands_between_its_source_and_its_node() -> None:
    genotype = CASES["random 1"]
    for cell_type in genotype.cell_types:
        axis = cell_axis(genotype, cell_type)
        places = {str(text.get_gid()): text.get_position() for text in axis.texts}
        for index, node in enumerate(genotype.cell(cell_type), start=2):
            x, y = places[f"{cell_type}-node-{index}"]
            output_x, _ = places[f"{cell_type}-node-{genotype.num_nodes + 2}"]
            assert x < output_x
            for _, source in node:
                source_x, _ = places[f"{cell_type}-node-{source}"]
                label_x, label_y = places[f"{cell_type}-edge-{source}-{index}"]
                assert source_x < label_x < x
                assert abs(label_y - y) < 40


def test_unused_input_is_drawn_faintly() -> None:
    axis = cell_axis(CASES["one node"], "normal")
    colours = {text.get_gid(): text.get_color() for text in axis.texts}
    assert colours["normal-node-0"] != colours["normal-node-1"] == colours["normal-node-3"]


def test_families_have_their_own_colours() -> None:
    families = (
        "sep_conv_3x3 sep_conv_5x5",
        "dil_conv_3x3",
        "max_pool_3x3 avg_pool_3x3",
        "skip_connect",
        "none other",
    )
    colours = [{operation_colour(name) for name in family.split()} for family in families]
    assert [len(found) for found in colours] == [1] * 5
    assert len(set().union(*colours)) == 5


def test_saved_file_is_the_same_every_time(tmp_path: Path) -> None:
    genotype = CASES["random 0"]
    path = save_cells(genotype, tmp_path / "cells" / "member.0")
    assert path == tmp_path / "cells" / "member.0.svg"
    again = save_cells(genotype, tmp_path / "again.svg")
    assert path.read_bytes() == again.read_bytes()
    code = (
        "import sys; from dnas_ens.figures.cells import save_cells;"
        "from dnas_ens.space.genotype import load_genotype;"
        "save_cells(load_genotype(sys.argv[1]), sys.argv[2]);"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    (tmp_path / "genotype.json").write_text(json.dumps(genotype.to_dict()))
    elsewhere = tmp_path / "elsewhere.svg"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "genotype.json"), str(elsewhere)],
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert elsewhere.read_bytes() == path.read_bytes()
    assert b"<dc:date>" not in path.read_bytes()
    assert genotype.canonical_hash().encode() in path.read_bytes()
