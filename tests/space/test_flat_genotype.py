"""The flat form of DARTS repositories: published cells read and written, what can not be built named."""

import json
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network
from dnas_ens.space.genotype import Genotype, load_genotype
from dnas_ens.space.stack import StackSpec

FIELDS = "normal normal_concat reduce reduce_concat"
#: The namedtuple of every DARTS repository.
Printed = namedtuple("Genotype", FIELDS)

# DARTS, second order (arXiv 1806.09055, figures 4 and 5), and PC-DARTS on CIFAR-10 (arXiv 1907.05737), as printed.
TEXTS = {
    "DARTS_V2": """Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
        ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
        reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
        ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])""",
    "PC_DARTS": """Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('dil_conv_3x3', 1),
        ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)], normal_concat=range(2, 6),
        reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0),
        ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))""",
}
PUBLISHED = {name: eval(text, {"Genotype": Printed}) for name, text in TEXTS.items()}


def by_nodes(edges):
    return tuple(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_form_and_file_is_the_same_genotype(name, tmp_path):
    printed = PUBLISHED[name]
    genotype = Genotype.from_dict(printed)
    assert (genotype.normal, genotype.reduction) == (by_nodes(printed.normal), by_nodes(printed.reduce))
    fields = printed._asdict()
    listed = {key: list(value) for key, value in fields.items()}
    grouped = {**listed, "normal": by_nodes(printed.normal), "reduce": list(map(list, by_nodes(printed.reduce)))}
    shuffled = {**listed, "normal_concat": [5, 2, 4, 3], "reduce_concat": (3, 2, 5, 4)}
    for form in (fields, json.loads(json.dumps(listed)), grouped, shuffled, repr(printed), genotype.to_dict()):
        assert Genotype.from_dict(form) == genotype
    for content in (
        json.dumps({"base": {"genotype": listed}}),
        json.dumps(repr(printed)),
        f"# A comment.\nfrom collections import namedtuple\n\nGenotype = namedtuple('Genotype', '{FIELDS}')\n\n"
        f"{name} = Genotype({', '.join(map(repr, printed))})\nDARTS = {name}\n",
        f"genotype = genotypes.{printed!r}".replace("range(2, 6)", "list(range(2, 6))"),
    ):
        (tmp_path / "cell").write_text(content)
        assert load_genotype(tmp_path / "cell") == genotype, content


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_as_it_was_printed_and_built(name):
    printed = PUBLISHED[name]
    genotype = Genotype.from_dict(printed)
    ranges = printed._replace(normal_concat=range(2, 6), reduce_concat=range(2, 6))
    # What a DARTS repository makes of it.
    assert eval(genotype.to_flat_text(), {"Genotype": Printed}) == ranges
    found = Printed(**json.loads(json.dumps(genotype.to_flat_dict())))
    assert [tuple(edge) for edge in found.normal] == printed.normal
    assert found.normal_concat == found.reduce_concat == [2, 3, 4, 5]
    network = Network(genotype, StackSpec(num_cells=3, channels=4, in_channels=3, num_classes=10)).eval()
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@st.composite
def flat_cells(draw, num_nodes):
    edges = []
    for index in range(num_nodes):
        sources = draw(st.lists(st.integers(0, index + 1), min_size=2, max_size=2, unique=True))
        edges += [(draw(st.sampled_from(["skip_connect", "sep_conv_3x3"])), source) for source in sources]
    return edges


@given(st.data(), st.integers(1, 6))
@settings(max_examples=30)
def test_round_trip(data, num_nodes):
    sizes = data.draw(st.sampled_from([(num_nodes, num_nodes), (num_nodes, 0), (0, num_nodes)]))
    normal, reduction = (data.draw(flat_cells(size)) for size in sizes)
    printed = Printed(normal, range(2, 2 + sizes[0]), reduction, range(2, 2 + sizes[1]))
    genotype = Genotype.from_dict(repr(printed))
    assert genotype.to_flat_text() == repr(printed)
    assert Genotype.from_dict(json.loads(json.dumps(genotype.to_flat_dict()))) == genotype


LISTED = {key: list(value) for key, value in PUBLISHED["DARTS_V2"]._asdict().items()}
SHORT = LISTED["normal"][:-1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"reduce_concat": [4, 5]}, "reduce_concat is [4, 5], but a cell of 4 nodes concatenates [2, 3, 4, 5]"),
        ({"normal_concat": range(10**15)}, "normal_concat is range(0, 1000000000000000)"),
        ({"normal_concat": [2, 3, 4, 4]}, "normal_concat is [2, 3, 4, 4]"),
        ({"normal_concat": [2, 3, 4, "5"]}, "normal_concat is [2, 3, 4, '5']"),
        ({"normal_concat": None}, "normal_concat is None"),
        ({"normal": SHORT}, "normal has 7 edges"),
        ({"normal": None}, "normal is None"),
        ({"normal": [*SHORT, ("skip_connect", 6)]}, "source 6"),
        ({"normal": [*SHORT, ("skip_connect", 0)]}, "twice"),
        ({"normal": [*SHORT, ("skip_connect",)]}, "skip_connect"),
        ({"reduce": "missing"}, "lacks reduce."),
        ({"normal_concat": "missing"}, "lacks normal_concat."),
        ({"reduction": []}, "no field 'reduction'"),
    ],
)
def test_what_can_not_be_built_is_named(change, named):
    with pytest.raises(UserError) as caught:
        Genotype.from_dict({key: value for key, value in (LISTED | change).items() if value != "missing"})
    assert named in caught.value.cause
    assert "\n" not in caught.value.cause + caught.value.remedy


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("\n".join(map(repr, PUBLISHED.values())), "holds 2 genotypes"),
        ("Genotype(", "can not be read"),
        ("Genotype(normal=__import__('os').getcwd(), reduce=[])", "can not be read"),
        ("Genotype(normal=[], normal_concat=range(2, n))", "can not be read"),
        ("Genotype(normal=[], normal_concat=range())", "can not be read"),
        ("Genotype(**fields)", "can not be read"),
        ("Genotype()", r"A genotype is an object of cells, not \{\}"),
        ("Genotype(" + "[" * 100_000, "can not be read"),
        ("genotype = 3", "holds 0 genotypes"),
    ],
)
def test_text_that_is_no_genotype_is_named(text, named, tmp_path):
    with pytest.raises(UserError, match=named) as caught:
        Genotype.from_dict(text)
    assert "\n" not in caught.value.cause
    (tmp_path / "cell.txt").write_text(text)
    with pytest.raises(UserError, match=r"cell\.txt"):
        load_genotype(tmp_path / "cell.txt")


def test_other_numbers_of_edges_have_no_flat_form():
    genotype = Genotype(normal=((("skip_connect", 0), ("skip_connect", 1)), (("skip_connect", 2),)))
    with pytest.raises(UserError, match="Node 1 of the normal cell has 1 edges"):
        genotype.to_flat_text()
