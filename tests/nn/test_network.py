import xml.etree.ElementTree as ET

from dnas_ens.nn.network import Network
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.stack import StackSpec


def test_a_notebook_shows_a_few_lines_and_the_cells():
    cell = ((("skip_connect", 0), ("sep_conv_3x3", 1)), (("max_pool_3x3", 1), ("skip_connect", 2)))
    stack = StackSpec(num_cells=3, channels=2, in_channels=1, num_classes=3)
    network = Network(Genotype(normal=cell, reduction=cell), stack)
    lines = repr(network).splitlines()
    assert lines[0].startswith("Network(3 cells, C=2, 3 classes, ")
    assert lines[-1] == "reduction 3 = max_pool_3x3(1) + skip_connect(2)"
    assert ET.fromstring(network._repr_svg_()).tag.endswith("svg")
