"""What the next unit of a budget may be, what it will cost, and what it is expected to gain.

Everything here is arithmetic on the units done so far. A first guess stands for what has not been measured yet, and
counts as one measurement beside those there are (docs/method.md says where the guesses are from).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from dnas_ens.config.settings import AVERAGED_RATE

Kind = Literal["first", "longer", "cycle", "copy", "cell"]

#: What each kind of unit is called.
NAMES: dict[Kind, str] = {
    "first": "first network",
    "longer": "the best network trained longer",
    "cycle": "a further cycle",
    "copy": "another network of the best cell",
    "cell": "a network of another cell",
}
#: A doubling of a network's epochs gains so much of its loss at first, and each further one this share of the last.
FIRST_DOUBLING, NEXT_DOUBLING = 0.15, 0.7
#: The second network of an ensemble gains so much of the loss; from M to M + 1 it is c / (M (M + 1)).
SECOND_NETWORK = 0.035
#: A cycle gains so much of the loss, and each further one of the same base this share of the last. The guess is high
#: enough for one to be tried before a network that would gain more: cycles are cheap and differ (docs/log.md).
FIRST_CYCLE, NEXT_CYCLE = 0.02, 0.8
#: The loss in training over that on val from where a longer training is expected to gain nothing (docs/log.md).
LAST_RATIO = 0.65
#: By how much the loss on val is above that on training images where a training ends, nats. This gap grows with the
#: epochs: after 50 it is 0.2 on 2,000 photographs of 16x16, 0.06 on as many images of Fashion-MNIST (docs/log.md).
END_GAP = 0.5
#: From this gap on, at its end, a network knows its images: it is not lengthened, and its cycles begin at the full
#: rate, so that they forget a part. Below it they go on at the rate where it has ended (docs/log.md).
KNOWN_GAP = 0.15
#: A network is looked at after these shares of the epochs that are enough, see `dnas_ens.budget.length`.
LOOKS = (1 / 6, 1 / 4, 1 / 3)
#: Lengthening makes a network this many times as long at least: what it is worth is known no better.
LEAST_GROWTH = 1.2
#: Epochs of a cycle as a share of its base's.
CYCLE_EPOCHS = 0.2
#: A cosine that goes on from the full rate forgets a part: L epochs and then x are worth KEPT * L + x in one go.
KEPT = 0.7
#: A network becomes at most so many times as long at once, so that a wrong forecast is noticed, and less where it is
#: nearly saturated; one of less than half of the epochs that are enough becomes as long as those.
LONGEST_GROWTH = 4
#: Weight of a first guess beside a measured doubling, whose noise is that of one network's loss.
GUESS = 0.25
#: A new network, or a cycle, may be this much shorter than others where the budget ends.
SHORTEST = 0.4


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One training that the budget pays for: half a cosine from a learning rate to 0.

    Args:
        kind: first: the first network; longer: the best one goes on; cycle: a network goes on
            for a few epochs; copy: another network of the best cell; cell: one of another cell.
        number: Of the network it makes; also decides its seeds.
        cell: Position of its genotype among the cells.
        parent: Number of the network it goes on from; None for fresh weights.
        epochs: Its length.
        learning_rate: Where the cosine begins.
    """

    kind: Kind
    number: int
    cell: int
    parent: int | None
    epochs: int
    learning_rate: float

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Unit:
        """Rebuild a unit from its dictionary; other keys in it are passed over."""
        return cls(**{field.name: entry[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Done:
    """A unit that is finished.

    Args:
        unit: What was to be done.
        epochs: How long it became; less than planned where time ran out, or where it was found to know its images.
        cost: Seconds, or epochs where the budget is one of epochs.
        train_loss: Mean loss of its last epoch, nats; None where it is not known.
        alone: Calibrated NLL of its network on val, cross-fitted, nats.
        loss: That of the ensemble chosen from all networks so far.
        members: Numbers of the networks in it.
        alone_error: Standard error over val images of what its network gained on the one it goes on from, nats; 0 where
            there is none.
        error: The same of what the ensemble gained.
        at: What had been spent of the budget then. Costs may add up to more where units are side by side.
        slots: How many units shared the threads.
    """

    unit: Unit
    epochs: int
    cost: float
    train_loss: float | None
    alone: float
    loss: float
    members: tuple[int, ...]
    alone_error: float = 0.0
    error: float = 0.0
    at: float = 0.0
    slots: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {**asdict(self), "members": list(self.members)}

    @classmethod
    def expected(cls, unit: Unit, history: Sequence[Done]) -> Done:
        """Return what stands for a unit in progress: an error without bound leaves its gain at the guess."""
        of = [done for done in history if unit.parent in (None, done.unit.number)]
        like = min(of, key=lambda done: done.alone)
        return replace(
            like,
            unit=unit,
            epochs=unit.epochs,
            loss=history[-1].loss,
            members=history[-1].members,
            alone_error=math.inf,
            error=math.inf,
        )

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Done:
        """Rebuild a unit from its dictionary; other keys in it are passed over."""
        own = {field.name: entry[field.name] for field in fields(cls)}
        return cls(**{**own, "unit": Unit.from_dict(entry["unit"]), "members": tuple(entry["members"])})


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A unit that could come next.

    Args:
        gain: By how much the ensemble's calibrated NLL is expected to fall, nats.
        cost: What it will take of the budget.
    """

    unit: Unit
    gain: float
    cost: float

    @property
    def rate(self) -> float:
        """Gain for each unit of cost."""
        return self.gain / self.cost


@dataclass(frozen=True, kw_only=True)
class Base:
    """A network from fresh weights with all that went on from it.

    Args:
        end: Its newest unit that is no cycle.
        newest: Its newest unit, from which it goes on.
        epochs: What its units but the cycles are worth in one go; see `KEPT`.
        earlier: Epochs and loss alone before the unit ``end``; None where that is the first one.
        cycle_gains: What each cycle has gained for the ensemble, as far as val can tell (see `believed`).
    """

    end: Done
    newest: Done
    epochs: float
    earlier: tuple[float, float] | None
    cycle_gains: tuple[float, ...]


def believed(measured: float, guess: float, error: float) -> float:
    """Return what to believe of a gain that was guessed and then measured with an error.

    The posterior mean g + (m - g) g^2 / (g^2 + e^2) for a normal gain whose mean and deviation are the guess: with many
    val images the measurement, with few ones the guess.
    """
    return guess + (measured - guess) * guess**2 / max(guess**2 + error**2, 1e-12)


def bases_of(history: Sequence[Done]) -> list[Base]:
    """Return the bases, in the order they were begun in."""
    bases: list[Base] = []
    of_network: dict[int, int] = {}
    for position, done in enumerate(history):
        unit = done.unit
        if unit.parent is None:
            of_network[unit.number] = len(bases)
            bases.append(Base(end=done, newest=done, epochs=done.epochs, earlier=None, cycle_gains=()))
            continue
        index = of_network[unit.number] = of_network[unit.parent]
        base = bases[index]
        if unit.kind == "cycle":
            before = history[position - 1].loss
            guess = cycle_guess(base, before, num_bases=len(bases))
            gains = (*base.cycle_gains, believed(before - done.loss, guess, done.error))
            bases[index] = replace(base, newest=done, cycle_gains=gains)
        else:
            bases[index] = Base(
                end=done,
                newest=done,
                epochs=KEPT * base.epochs + done.epochs,
                earlier=(base.epochs, base.end.alone),
                cycle_gains=(),
            )
    return bases


def cycle_guess(base: Base, loss: float, *, num_bases: int) -> float:
    """Return what the next cycle of a base is expected to gain for the ensemble before any was measured."""
    return FIRST_CYCLE * NEXT_CYCLE ** len(base.cycle_gains) * loss / num_bases


def left_to_learn(done: Done) -> float:
    """Return the factor by which saturation lowers what a longer training gains, in [0, 1].

    The loss on val is that in training and a gap, and a longer training takes off the one and adds to the other. The
    factor is 1 as long as there is no gap, and 0 from where both are level: at a training loss of 0.65 of that on val.
    """
    if done.train_loss is None:
        return 1.0
    return min(1.0, max(0.0, (done.train_loss / done.alone - LAST_RATIO) / (1 - LAST_RATIO)))


def gap(done: Done) -> float:
    """Return by how much the loss on val is above that in training, nats; infinite where the latter is not known."""
    return math.inf if done.train_loss is None else done.alone - done.train_loss


def saturated_after(epochs: float, gap: float) -> float:
    """Return after how many epochs a training should end, where the loss on val is that of training and `END_GAP`.

    Args:
        epochs: Those so far.
        gap: By how much the loss on val is above that in training after them, nats.
    """
    return epochs * END_GAP / gap if gap > 0 else math.inf


def next_doubling(base: Base) -> float:
    """Return what the next doubling of a base's epochs is expected to take off its own loss, nats.

    With d doublings since the earlier length that gained G together, and each gaining a share r of the one before, the
    next gains G r^d (1 - r) / (1 - r^d).
    """
    guess = FIRST_DOUBLING * base.end.alone
    if base.earlier is None or base.epochs <= base.earlier[0]:
        return left_to_learn(base.end) * guess
    left: float = NEXT_DOUBLING ** math.log2(base.epochs / base.earlier[0])
    in_one = (1 - left) / (1 - NEXT_DOUBLING)
    gain = believed(base.earlier[1] - base.end.alone, FIRST_DOUBLING * base.earlier[1] * in_one, base.end.alone_error)
    return left_to_learn(base.end) * max(0.0, (1 - GUESS) * gain * left / in_one + GUESS * guess * left)


def gain_of_growth(base: Base, growth: float) -> float:
    """Return what a base is expected to gain for itself from becoming ``growth`` times as long, nats."""
    share: float = 1 - NEXT_DOUBLING ** math.log2(growth)
    return next_doubling(base) * share / (1 - NEXT_DOUBLING)


def network_constant(history: Sequence[Done], kind: Kind) -> float:
    """Return c of the gain c / (M (M + 1)) that another base brings to M bases, nats; see `SECOND_NETWORK`.

    It is the mean of the guess and of what bases of the kind have brought, or, where there is none, those of the other.
    """
    found: dict[Kind, list[float]] = {"copy": [], "cell": []}
    bases = 1
    guess = 2 * SECOND_NETWORK * history[-1].loss
    for before, done in itertools.pairwise(history):
        if done.unit.parent is None:
            scale = bases * (bases + 1)
            found[done.unit.kind].append(believed((before.loss - done.loss) * scale, guess, done.error * scale))
            bases += 1
    counted = found[kind] or [gain for gains in found.values() for gain in gains]
    return max(0.0, sum([guess, *counted]) / (1 + len(counted)))


def forecasts(
    history: Sequence[Done],
    *,
    left: float,
    epoch_cost: Callable[[int], float],
    num_cells: int,
    learning_rate: float,
    enough: float = 0.0,
    shortest_cycle: int = 1,
    setup_cost: float = 0.0,
    longest: float = math.inf,
    busy: Container[int] = (),
) -> list[Forecast]:
    """Return what could come next, the best first.

    Args:
        history: What was done, at least the first unit.
        left: What is left of the budget.
        epoch_cost: Gives the cost of an epoch of the cell of a number.
        num_cells: How many cells there are, or can be.
        learning_rate: Where every cosine begins.
        enough: Length, in epochs, that a short network may reach at once.
        shortest_cycle: Epochs that a cycle needs at least to come down from its learning rate.
        setup_cost: What finding the other cells costs, until they are found.
        longest: What one unit may cost at most; less than what is left where several are trained side by side.
        busy: Numbers of networks that are being trained; nothing can go on from them yet.

    Returns:
        By falling gain for each unit of cost; empty where nothing fits in what is left.
    """
    bases, loss, number = bases_of(history), history[-1].loss, len(history)
    best = min(bases, key=lambda base: base.end.alone)
    usual = best.epochs
    found: list[Forecast] = []

    def add(
        kind: Kind, cell: int, parent: int | None, epochs: float, gain: float, *, setup: float = 0.0, rate: float = 1.0
    ) -> None:
        whole = max(1, round(epochs))
        cost = setup + whole * epoch_cost(cell)
        if cost <= min(left, longest) and gain > 0:
            begin = rate * learning_rate
            unit = Unit(kind=kind, number=number, cell=cell, parent=parent, epochs=whole, learning_rate=begin)
            found.append(Forecast(unit=unit, gain=gain, cost=cost))

    cycles = [(_next_cycle(base, bases, loss), base) for base in bases]
    used = {base.end.unit.cell for base in bases}
    fresh = [cell for cell in range(num_cells) if cell not in used]
    # Where both are worth the same another cell is taken, so that both are tried where there is room for several.
    ways: list[tuple[Kind, int, float]] = [("cell", cell, setup_cost) for cell in fresh[:1]]
    ways.append(("copy", best.end.unit.cell, 0.0))
    plans = {
        way: _networks_then_cycles(
            left - way[2],
            cost=usual * epoch_cost(way[1]),
            cycle_cost=max(shortest_cycle, CYCLE_EPOCHS * usual) * epoch_cost(way[1]),
            constant=network_constant(history, way[0]),
            num_bases=len(bases),
            next_cycles=[expected for expected, _ in cycles],
        )
        for way in ways
    }
    kind, cell, setup = max(plans, key=lambda way: plans[way][0])
    share = min(1.0, (min(left, longest) - setup) / (usual * epoch_cost(cell)))
    kept = plans[kind, cell, setup][1] if share >= SHORTEST else 0.0
    # A cycle is cheap, and would be taken until a further network, which is worth more, no longer fits.
    spare = left - (setup + kept if kept else 0.0)
    if share >= SHORTEST:
        # The last one of a budget may be shorter, and is then worth less.
        gain = network_constant(history, kind) / (len(bases) * (len(bases) + 1)) * share**2
        add(kind, cell, None, math.floor(share * usual), gain, setup=setup)
    cost = epoch_cost(best.end.unit.cell)
    longer = _longer(best, history, left=left, cost=cost, num_bases=len(bases), enough=enough, longest=longest)
    if longer and best.newest.unit.number not in busy:
        add("longer", best.end.unit.cell, best.newest.unit.number, *longer)
        if len(bases) == 1 and found and found[-1].unit.kind == "longer":
            # What is left is worth most once the network is longer.
            return found[-1:]
    for expected, base in cycles:
        wanted = max(shortest_cycle, round(CYCLE_EPOCHS * base.epochs))
        epochs = min(wanted, int(min(spare, longest) / epoch_cost(base.end.unit.cell)))
        # A cycle of a few steps ends worse than it began.
        if base.newest.unit.number not in busy and epochs >= max(shortest_cycle, SHORTEST * wanted):
            rate = 1.0 if gap(base.end) >= KNOWN_GAP else AVERAGED_RATE
            add("cycle", base.end.unit.cell, base.newest.unit.number, epochs, expected, rate=rate)
    found.sort(key=lambda forecast: forecast.rate, reverse=True)
    return found


def _next_cycle(base: Base, bases: Sequence[Base], loss: float) -> float:
    """Return what the next cycle of a base is expected to gain, nats.

    The first one is expected to bring what the guess and those of the other bases say.
    """
    if latest := base.cycle_gains[-2:]:
        return NEXT_CYCLE * sum(latest) / len(latest)
    firsts = [other.cycle_gains[0] for other in bases if other.cycle_gains]
    return sum([cycle_guess(base, loss, num_bases=len(bases)), *firsts]) / (1 + len(firsts))


def _networks_then_cycles(
    left: float, *, cost: float, cycle_cost: float, constant: float, num_bases: int, next_cycles: Sequence[float]
) -> tuple[float, float]:
    """Return what the rest of a budget can gain at most, and how much of it goes to further networks of a cost.

    Of the plans "k networks, then cycles of all of them with the rest", k = 0, 1, 2, ..., the best. The last network
    may be shorter, as in `forecasts`; n cycles of a base gain g (1 - r^n) / (1 - r), g its next one and r `NEXT_CYCLE`.
    """
    mean = sum(next_cycles) / len(next_cycles)

    def of_cycles(rest: float, bases: int) -> float:
        each = max(0.0, rest) / (cycle_cost * bases)
        # The gain of a cycle for the ensemble falls with the number of its bases.
        return float(mean * num_bases * (1 - NEXT_CYCLE**each) / (1 - NEXT_CYCLE))

    best, kept = of_cycles(left, num_bases), 0.0
    gain, spent, bases = 0.0, 0.0, num_bases
    while (share := min(1.0, (left - spent) / cost)) >= SHORTEST:
        gain += constant / (bases * (bases + 1)) * share**2
        spent, bases = spent + share * cost, bases + 1
        if gain + of_cycles(left - spent, bases) > best:
            best, kept = gain + of_cycles(left - spent, bases), spent
    return best, kept


def _longer(
    base: Base, history: Sequence[Done], *, left: float, cost: float, num_bases: int, enough: float, longest: float
) -> tuple[float, float] | None:
    """Return by how many epochs to lengthen a base and the gain, looking ahead to the end of the budget.

    Lengthening by x of the R epochs left makes the base L' = KEPT L + x long; the R - x that remain buy
    M - 1 = (R - x) / L' more networks of that length, or cycles worth as much for their cost. The least
    (loss - gain of growth) * (1 - s (1 - 1 / M)) decides, s being what an endless ensemble gains of the loss. With
    several bases lengthening one helps the ensemble by its share alone.
    """
    epochs_left, reach = left / cost, min(left, longest) / cost
    share = max(0.0, network_constant(history, "copy") / history[-1].loss)

    def final(length: float) -> float:
        longer = KEPT * base.epochs + length if length else base.epochs
        loss = base.end.alone - gain_of_growth(base, longer / base.epochs) / num_bases
        networks = num_bases + (epochs_left - length) / longer
        return loss * (1 - share * (1 - 1 / networks))

    lengths = [
        length
        for length in (math.floor(tenth * reach / 10) for tenth in range(1, 11))
        if KEPT + length / base.epochs > 1
    ]
    useful = math.inf
    # Else looks at it on the way decide.
    if base.end.train_loss is not None and KEPT * base.epochs >= LOOKS[0] * enough:
        useful = saturated_after(base.epochs, gap(base.end)) if gap(base.end) < KNOWN_GAP else 0.0
    if not lengths or useful < LEAST_GROWTH * base.epochs:
        return None
    length = min(lengths, key=final)
    if final(length) >= final(0):
        return None
    # Not more at once than lets a wrong forecast be noticed, unless what would be left is of no use.
    growth = 1 + (LONGEST_GROWTH - 1) * left_to_learn(base.end)
    goal = enough if 2 * base.epochs <= enough else max(enough, growth * base.epochs)
    most = math.ceil(min(goal, useful) - KEPT * base.epochs)
    # A cycle is of use.
    if length > most and epochs_left - most >= CYCLE_EPOCHS * most:
        length = most
    if useful < math.inf:
        length = min(length, math.ceil(useful - KEPT * base.epochs))
    if KEPT + length / base.epochs < LEAST_GROWTH:
        return None
    return length, gain_of_growth(base, KEPT + length / base.epochs) / num_bases
