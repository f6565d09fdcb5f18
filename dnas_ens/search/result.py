"""What a search found: base, candidates, choice, and how lambda steers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dnas_ens.config import SearchConfig
from dnas_ens.errors import UserError
from dnas_ens.search.candidates import Candidate
from dnas_ens.search.family import ArchitectureFamily, DiversityCurve
from dnas_ens.search.hypernetwork import Hypernetwork
from dnas_ens.space.genotype import Genotype, ranked_genotypes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEMBERS_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of ``dnas_ens.search``.

    Args:
        candidates: The pool, with scores.
        ranking: Positions in the pool in the order that larger ensembles take them in, the chosen members first.
        curve: The sweep of lambda; None for random deviations, which have no hypernetwork.
        family: All architectures the search learnt; None for random deviations.
        temperature: Temperature of the family's distributions at the end of the search.
        report: Scalars: discretisation gap, entropy, seconds, ensemble NLL with inherited weights.
        execution: Layout and precision the supernet was computed in; empty where there was none.
    """

    config: SearchConfig
    base: Genotype
    candidates: list[Candidate]
    ranking: list[int]
    curve: DiversityCurve | None = None
    family: ArchitectureFamily | None = None
    temperature: float = 1.0
    report: dict[str, float] = field(default_factory=dict)
    execution: dict[str, str | bool] = field(default_factory=dict)

    @classmethod
    def given(cls, config: SearchConfig, genotypes: Sequence[Genotype]) -> SearchResult:
        """Return members that no search has found here, the first of them as the base."""
        base, *_ = genotypes
        pool = [Candidate(genotype=each, shared_edges=each.shared_edges(base)) for each in genotypes]
        return cls(config=config, base=base, candidates=pool, ranking=list(range(len(pool))))

    def _heading(self) -> str:
        return f"{len(self.selected)} members of {len(self.candidates)} candidates, regime {self.config.regime}"

    def __repr__(self) -> str:
        members = [
            f"member {member}: candidate {index}, {self.candidates[index]}"
            for member, index in enumerate(self.selected[:_MEMBERS_NAMED])
        ]
        more = ["..."] if len(self.selected) > _MEMBERS_NAMED else []
        return "\n  ".join([f"SearchResult: {self._heading()}", *members, *more])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table of the members and the cells of the base."""
        from dnas_ens.figures.cells import draw_genotype
        from dnas_ens.figures.style import to_svg

        heads = "member", "candidate", "λ", "direction", "D to base", "shared edges", "val NLL, inherited"
        rows = [
            [str(member), str(index), *self.candidates[index].cells()] for member, index in enumerate(self.selected)
        ]
        table = "".join(
            f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in row)}</tr>"
            for tag, row in [("th", heads), *(("td", row) for row in rows)]
        )
        svg = base64.b64encode(to_svg(draw_genotype(self.base)).encode()).decode()
        return (
            f"<p>{self._heading()}</p><table>{table}</table>"
            f'<p>Base</p><img alt="cells of the base" src="data:image/svg+xml;base64,{svg}">'
        )

    @property
    def hypernetwork(self) -> Hypernetwork | None:
        """The map from (lambda, direction) to architecture logits; None for random deviations."""
        return None if self.family is None else self.family.hypernetwork

    @property
    def selected(self) -> list[int]:
        """Positions in the pool of the chosen members, in the order of their choice."""
        return self.ranking[: self.config.candidates.members]

    @property
    def genotypes(self) -> list[Genotype]:
        """The chosen members' genotypes, in the order of their choice."""
        return self.ranked()

    def ranked(self, members: int | None = None) -> list[Genotype]:
        """Return the genotypes of an ensemble of another size, the members first that the search chose.

        Args:
            members: Its size; None for the size of the selected ensemble.

        Raises:
            UserError: The pool does not hold so many.
        """
        return ranked_genotypes(self.to_dict(), members)

    def sample(self, lam: float, direction: int = 0) -> Genotype:
        """Return the genotype at a point of the family.

        Args:
            lam: Diversity parameter, clipped to [0, max_lambda].
            direction: In [0, R).

        Raises:
            UserError: If there is no hypernetwork or no such direction.
        """
        if self.family is None:
            raise UserError("A search by random deviations has no hypernetwork.", "Search with --regime star.")
        num_directions = self.config.hypernetwork.directions
        if not 0 <= direction < num_directions:
            raise UserError(
                f"There is no direction {direction}.",
                f"Give one of 0 to {num_directions - 1}.",
            )
        return self.family.genotypes(self.family.point(lam, direction))[0]

    def plot(self) -> Figure:
        """Draw lambda against D to the base and against the shared edges, one line a direction.

        Raises:
            UserError: If there is no hypernetwork.
        """
        from dnas_ens.figures.plots import plot_diversity_curve

        if self.curve is None:
            raise UserError("A search by random deviations has no curve.", "Search with --regime star.")
        return plot_diversity_curve(
            self.curve.lam,
            self.curve.distance_to_base,
            self.curve.shared_edges,
            directions=self.curve.direction,
            is_distance=self.config.objective.penalty == "js-pairwise",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of genotypes.json."""
        return {
            "base": {"genotype": self.base.to_dict()},
            "selected": self.selected,
            "ranking": self.ranking,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "temperature": self.temperature,
            "curve": None if self.curve is None else asdict(self.curve),
            "report": self.report,
            "execution": self.execution,
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any], *, config: SearchConfig) -> SearchResult:
        """Rebuild the result from genotypes.json, without its hypernetwork."""
        return cls(
            config=config,
            base=Genotype.from_dict(entry["base"]["genotype"]),
            candidates=[Candidate.from_dict(candidate) for candidate in entry["candidates"]],
            ranking=list(entry["ranking"]),
            curve=None if entry["curve"] is None else DiversityCurve(**entry["curve"]),
            temperature=entry["temperature"],
            report=entry["report"],
            execution=entry.get("execution", {}),
        )
