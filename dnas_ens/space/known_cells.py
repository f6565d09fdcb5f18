"""Cells that people design by hand, as points of the efficient space: what a search has to beat."""

from __future__ import annotations

from pathlib import Path

from dnas_ens.space.genotype import Genotype, load_genotype

_CONV, _SKIP = "conv_3x3", "skip_connect"

#: With three cells and a stem of stride 2 this is `dnas_ens.nn.reference_models.SixLayerCNN`: 3x3 convolutions,
#: one in a normal cell and two in a reduction cell (as in VGG, arXiv 1409.1556, with BatchNorm).
PLAIN_CNN = Genotype(
    space="efficient",
    normal=(((_CONV, 0),), ((_SKIP, 1),), ((_SKIP, 2),)),
    reduction=(((_CONV, 0),), ((_CONV, 1),), ((_SKIP, 2),)),
)
#: A residual block (arXiv 1512.03385), with a projection where the size changes.
RESNET = Genotype(
    space="efficient",
    normal=(((_CONV, 0),), ((_SKIP, 0), (_CONV, 1)), ((_SKIP, 2),)),
    reduction=(((_CONV, 0),), (("conv_1x1", 0), (_CONV, 1)), ((_SKIP, 2),)),
)
#: What they are called where a base can be given.
KNOWN_CELLS = {"plain-cnn": PLAIN_CNN, "resnet": RESNET}


def given_base(base: str | Path) -> Genotype:
    """Return a known cell by its name, or the genotype of a file; see `load_genotype`."""
    known = None if Path(base).exists() else KNOWN_CELLS.get(str(base))
    return load_genotype(base) if known is None else known
