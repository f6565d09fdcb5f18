import json
import re
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch, PathPatch

from dnas_ens.figures.cells import draw_genotype, save_cells
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.spaces import DARTS_OPERATIONS

NAMES = DARTS_OPERATIONS
LONG_NAME = "a_custom_operation_of_a_very_long_name_9x9"
CASES = {
    "chain": Genotype(reduction=tuple(((NAMES[n + 3], 0), (NAMES[n], n + 1)) for n in range(4))),
    "every edge": Genotype(reduction=tuple(tuple((NAMES[n + s], s) for s in range(n + 2)) for n in range(3))),
    "one node": Genotype(normal=((("skip_connect", 1),),)),
    "long name": Genotype(normal=(((LONG_NAME, 0), ("none", 1)),) * 2),
    "six nodes": tiny.genotype(3, num_nodes=6, cell_types=("normal", "reduction")),
    "one input": tiny.genotype(0, space="efficient", num_nodes=4, cell_types=("normal", "reduction")),
}


def contains(outer, inner):
    return (outer.min <= inner.min).all() and (inner.max <= outer.max).all()


def assert_nothing_overlaps(figure, *, point=100 / 72):
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
    assert all(contains(figure.bbox, text) for text in texts.values())
    for (name, text), (other_name, other) in combinations(texts.items(), 2):
        assert not text.padded(3 * point).overlaps(other), (name, other_name)
    assert not any(one.padded(3 * point).overlaps(other) for one, other in combinations(boxes, 2))
    for name, text in texts.items():
        holders = [box for box in boxes if contains(box.padded(-2 * point), text)]
        touched = [box for box in boxes if box.overlaps(text)]
        inside = "-edge-" in name or "-node-" in name
        assert len(holders) == len(touched) == inside, name
    for line in (patch for patch in patches if isinstance(patch, PathPatch)):
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


@pytest.mark.parametrize("genotype", CASES.values(), ids=CASES.keys())
def test_every_operation_and_node_is_named_and_nothing_overlaps(genotype):
    figure = draw_genotype(genotype, title="Member 3: λ = 0.50, direction 2")
    assert_nothing_overlaps(figure)
    for cell_type, axis in zip(genotype.cell_types, figure.axes, strict=True):
        inputs = {"darts": ["$c_{k-2}$", "$c_{k-1}$"], "efficient": ["$c_{k-1}$"]}[genotype.space]
        first, how = len(inputs), {"darts": "concat", "efficient": "sum"}[genotype.space]
        ends = {f"node-{index}": text for index, text in enumerate(inputs)}
        ends |= {f"node-{genotype.num_nodes + first}": "$c_k$", how: how}
        expected = {"title": f"{cell_type.capitalize()} cell", **ends}
        for index, node in enumerate(genotype.cell(cell_type)):
            expected[f"node-{index + first}"] = str(index)
            for name, source in node:
                read = re.sub(r"(\d)x\1", r"\1×\1", name).replace("_", " ")
                expected[f"edge-{source}-{index + first}"] = read
        found = {text.get_gid().removeprefix(f"{cell_type}-"): text.get_text() for text in axis.texts}
        assert found == expected


def test_saved_file_is_the_same_every_time(tmp_path):
    genotype = CASES["chain"]
    path = tmp_path / "cells" / "member.0.svg"
    save_cells(genotype, path)
    code = """
import sys
from pathlib import Path
from dnas_ens.figures.cells import save_cells
from dnas_ens.space.genotype import load_genotype
save_cells(load_genotype("genotype.json"), Path("elsewhere.svg"))
assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules
"""
    (tmp_path / "genotype.json").write_text(json.dumps(genotype.to_dict()))
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)
    written = path.read_bytes()
    assert (tmp_path / "elsewhere.svg").read_bytes() == written
    assert b"<dc:date>" not in written
    assert all(named.encode() in written for named in (genotype.canonical_hash(), 'id="reduction-edge-0-2"'))
