"""Where a budget's cells are from: hand-made ones to begin with, and a search around one once others are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dnas_ens.config import SearchConfig
from dnas_ens.data.dataset import ImageData
from dnas_ens.search.run import require_same_search, run_search
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.known_cells import PLAIN_CNN, RESNET

if TYPE_CHECKING:
    from dnas_ens.run.folder import RunFolder

#: How far the cells lie from the base at most: further ones take longer and are worse alone (docs/log.md).
MAX_LAMBDA = 0.3
#: Seconds of a search by the star alone (docs/method.md), which needs no image; what an epoch of its cells takes, as a
#: multiple of the plain CNN's.
STAR_SECONDS, STAR_COST = 4.0, 1.4


class StarCells:
    """A plain CNN, and cells by the star alone, whose paths leave a residual block.

    In another space, with other operations or numbers of nodes, there is nothing by hand, and the paths leave a learnt
    base; or one that the configuration gives.

    Args:
        config: What kind of search; its likelihood is left out.
        run: Where the search goes, so that it is resumed and reported like any other; None to keep nothing.
    """

    def __init__(
        self,
        config: SearchConfig,
        data: ImageData,
        *,
        device: torch.device | str = "cpu",
        run: RunFolder | None = None,
    ) -> None:
        supernet = config.supernet
        by_hand = supernet.space == "efficient" and supernet.operations is None and config.hypernetwork.base is None
        by_hand = by_hand and supernet.search_space.num_nodes == PLAIN_CNN.num_nodes
        objective = replace(config.objective, likelihood="none")
        # One member, so that a search that finds few different cells is none that fails.
        candidates = replace(config.candidates, candidate_epochs=0, score_images=None, members=1)
        hypernetwork = config.hypernetwork
        if by_hand:
            hypernetwork = replace(hypernetwork, max_lambda=min(MAX_LAMBDA, hypernetwork.max_lambda))
        self._config = replace(config, objective=objective, candidates=candidates, hypernetwork=hypernetwork)
        self._data, self._device, self._run = data, device, run
        self.count = config.candidates.members + 1
        self._found: list[Genotype] | None = None
        self.setup_seconds, self.relative_cost = (STAR_SECONDS, STAR_COST) if by_hand else (0.0, 1.0)
        self._begins_from = RESNET if by_hand else None
        if run is not None and by_hand:
            require_same_search(self._config, run, self._begins_from)
        self.known: Sequence[Genotype] = [PLAIN_CNN] if by_hand else self.find()[:1]

    def find(self) -> Sequence[Genotype]:
        """Search, and return the known cells and the others."""
        if self._found is None:
            result = run_search(
                self._config, self._data, device=self._device, run=self._run, resume=True, base=self._begins_from
            )
            known = [PLAIN_CNN] if self._begins_from else [result.base]
            there = {genotype.canonical() for genotype in known}
            ranked = result.ranked(len(result.ranking))
            self._found = [*known, *(genotype for genotype in ranked if genotype.canonical() not in there)][
                : self.count
            ]
        return self._found
