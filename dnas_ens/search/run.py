"""A whole search: loop, candidate pool, choice, and what is written to the run folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.config.fields import to_dict
from dnas_ens.config.presets import retrain_preset
from dnas_ens.data.dataset import ImageData
from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import nll
from dnas_ens.nn.execution import candidates as execution_candidates
from dnas_ens.nn.operations import require_operations
from dnas_ens.run.checkpoint import CheckpointStore, RegularStates
from dnas_ens.run.files import as_json, first_difference
from dnas_ens.run.progress import CostMeter, Progress
from dnas_ens.run.ranks import current
from dnas_ens.search.candidates import deviation_pool, draw_pool, rank, score, select, spread_order
from dnas_ens.search.cost import member_stack
from dnas_ens.search.family import ArchitectureFamily, diversity_curve
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.result import SearchResult
from dnas_ens.search.star import FamilyLoop, StarLoop
from dnas_ens.search.step_time import StepTimes, measured_step_times
from dnas_ens.space.genotype import Genotype, read_genotypes
from dnas_ens.space.known_cells import given_base
from dnas_ens.training.step import tell_if_guessing

if TYPE_CHECKING:
    from dnas_ens.run.folder import RunFolder

#: Skip connections in a cell past which a search is suspected of collapse (DARTS+, arXiv 1909.06035).
SKIP_WARNING = 2
#: Steps of the weights below which a search has learnt next to nothing: half of what the smallest preset has.
FEW_STEPS = 100
#: What the members' operations take, so that a resumed search goes on with the same figures.
_STEP_TIME = "step_time.json"
_SAVED = "The search that this folder has a state of"
#: Scalars in the line of an epoch, by the name they have there.
_SHOWN = {
    "loss": "train_loss",
    "architecture_loss": "architecture_loss",
    "penalty": "penalty",
    "val_accuracy": "val_accuracy",
    "D": "member_distance",
    "skips": "skips",
    "entropy": "entropy",
    "step_ms": "step_ms",
}


def run_search(
    config: SearchConfig,
    data: ImageData,
    *,
    device: torch.device | str = "cpu",
    run: RunFolder | None = None,
    resume: bool = False,
    base: Genotype | None = None,
    recipe: RetrainConfig | None = None,
) -> SearchResult:
    """Search, choose the members, and write both to the run folder if there is one.

    Args:
        data: Images; ``test`` is not read.
        run: The run folder; of several ranks the first one's alone.
        resume: Whether to continue from the newest checkpoint of the run folder.
        base: A given base; by default the file the configuration names is read.
        recipe: How members will be trained; by default as the preset says.

    Raises:
        UserError: If base, operations or candidates do not fit.
    """
    require_operations(config.supernet.search_space.operations)
    if base is None and config.hypernetwork.base is not None:
        base = given_base(config.hypernetwork.base)
    ranks = current()
    loop: FamilyLoop | None = None
    result = _finished(config, run, base) if resume and run is not None else None
    if was_finished := ranks.shared(result is not None):
        pass
    elif config.regime == "random":
        result = _random_deviations(config, base)
    else:
        recipe = (recipe or retrain_preset(config.preset, config.supernet.space)).with_stem_of(config)
        options: dict[str, Any] = {"device": device, "base": base}
        trial = CostMeter(gpu=torch.device(device).type == "cuda")
        if config.objective.step_time_weight > 0:
            space, edges_per_node = config.supernet.search_space, config.candidates.edges_per_node
            times = _step_times(config, data, recipe, device=device, run=run).to_dict() if ranks.first else {}
            options["step_times"] = StepTimes.from_dict(ranks.shared(times), space=space, edges_per_node=edges_per_node)
        loop = SearchLoop(config, data, **options) if config.reads_images else StarLoop(config, **options)
        if config.reads_images:
            _tell_steps(loop.num_epochs * loop.steps_per_epoch)
        cost = train(loop, run=run, resume=resume, spent=trial.seconds())
        result = conclude(loop, recipe=recipe, cost=cost)
    if ranks.size > 1:
        # Another GPU may round differently, and all ranks must go on with the same members.
        stored = ranks.shared({} if result is None else result.to_dict())
        result = result if ranks.first else SearchResult.from_dict(stored, config=config)
    assert result is not None
    if run is not None and not was_finished:
        if loop is not None:
            _write_weights(loop, run)
        _draw_result(result, run)
        run.metrics.add_hparams(
            to_dict(config),
            phase="search",
            metrics=["val_accuracy"] * config.reads_images + ["member_distance", "undecided"],
        )
        # Last, because this file says that the search is finished.
        run.write_json("genotypes.json", result.to_dict() | {"identity": _identity(config, base)})
    return result


def _identity(config: SearchConfig, base: Genotype | None) -> dict[str, Any]:
    """Return what a search depends on besides its images, which the run folder notes: a base may be of any file."""
    fields: dict[str, Any] = to_dict(config)
    del fields["data"]
    fields["hypernetwork"]["base"] = None if base is None else base.to_dict()
    return fields


def _require_identity(found: Mapping[str, Any], config: SearchConfig, base: Genotype | None, what: str) -> None:
    """Refuse what another search has left, naming the first difference."""
    difference = first_difference(found.get("identity"), as_json(_identity(config, base)), "search")
    if difference is not None:
        field, there, here = difference
        raise UserError(
            f"{what} is another one: {field} is {there} there and {here} here.", "Name another folder with --run-dir."
        )


def require_same_search(config: SearchConfig, run: RunFolder, base: Genotype | None) -> None:
    """Refuse a folder in which another search has begun, before time is spent on what comes before this one."""
    genotypes = run.file("genotypes.json")
    if genotypes.exists() and "ranking" in (found := read_genotypes(genotypes)):
        _require_identity(found, config, base, f"The search in {run.path}")
    if (newest := CheckpointStore(run.path / "checkpoints", name="search").load_newest()) is not None:
        _require_identity(newest[1], config, base, _SAVED)


def _tell_steps(steps: int) -> None:
    """Say how many steps a search has, and that too few find cells by chance."""
    few = (
        f": so few that its cells are hardly better than random ones. More --epochs or a smaller --batch-size give "
        f"{FEW_STEPS} or more; --likelihood none needs no images"
    )
    print(f"the search has {steps:,} steps{few if steps < FEW_STEPS else ''}", file=sys.stderr, flush=True)


def _finished(config: SearchConfig, run: RunFolder, base: Genotype | None) -> SearchResult | None:
    """Return the result of a search that is finished in a run folder, unchanged; None if it is not finished."""
    from dnas_ens.run.files import load_tensors

    if not run.file("genotypes.json").exists():
        return None
    found = read_genotypes(run.file("genotypes.json"))
    if "ranking" not in found:
        return None
    _require_identity(found, config, base, f"The search in {run.path}")
    print(f"the search in {run.path} is finished", file=sys.stderr, flush=True)
    # Reports a log that does not belong to this search, as resuming does.
    run.metrics.read("search")
    result = SearchResult.from_dict(found, config=config)
    file = run.file("hypernetwork.safetensors")
    if not file.exists():
        return result
    family = ArchitectureFamily(config, base=base)
    family.hypernetwork.load_state_dict(load_tensors(file))
    family.temperature = result.temperature
    return replace(result, family=family)


def _step_times(
    config: SearchConfig, data: ImageData, recipe: RetrainConfig, *, device: torch.device | str, run: RunFolder | None
) -> StepTimes:
    """Measure what the members' operations take on the device, or read it where the run has measured it before."""
    supernet = config.supernet
    space, edges_per_node = supernet.search_space, config.candidates.edges_per_node
    if run is not None and run.file(_STEP_TIME).exists():
        return StepTimes.from_dict(run.read_json(_STEP_TIME), space=space, edges_per_node=edges_per_node)
    device = torch.device(device)
    times = measured_step_times(
        space,
        member_stack(config, recipe, data),
        image_size=data.image_size,
        batch_size=recipe.batch_size,
        edges_per_node=edges_per_node,
        execution=execution_candidates(
            layout=recipe.layout, precision=recipe.precision, device=device, cuda_graph=recipe.cuda_graph
        )[0],
        device=device,
    )
    print(
        f"measured {len(times.places)} operations at their places: a step of the uniform mixture would take "
        f"{times.uniform():.1f} ms, {times.rest:.1f} ms of it whatever is chosen",
        file=sys.stderr,
        flush=True,
    )
    if run is not None:
        run.write_json(_STEP_TIME, times.to_dict())
    return times


def train(
    loop: FamilyLoop,
    *,
    run: RunFolder | None = None,
    resume: bool = False,
    spent: Mapping[str, float] | None = None,
) -> CostMeter:
    """Run the loop to its end, with a checkpoint after every epoch.

    Args:
        spent: Seconds of what went before a search that begins, as ``CostMeter`` has them.

    Returns:
        The meter of what the search costs, over all its starts; it keeps running.
    """
    store = None if run is None else CheckpointStore(run.path / "checkpoints", name="search")
    newest = store.load_newest() if resume and store is not None else None
    state = loop.ranks.shared_state(None if newest is None else newest[1])
    before = dict(spent or {}) if state is None else state["seconds"]
    if state is not None:
        _require_identity(state, loop.config, loop.family.base, _SAVED)
        loop.load_state_dict(state["loop"])
    if resume and run is not None:
        # Also without a state: a process may have been killed after the first epoch's log line and before its state.
        run.metrics.truncate("search", step=loop.step)
    loop.require_agreement()
    cost = CostMeter(before, gpu=loop.device.type == "cuda", processes=loop.ranks.size)
    identity = as_json(_identity(loop.config, loop.family.base))
    with Progress(
        loop.num_epochs,
        description="search",
        steps_per_epoch=loop.steps_per_epoch,
        initial_epoch=loop.epoch,
    ) as progress:

        def save() -> None:
            if store is not None:
                state = {"loop": loop.state_dict(), "seconds": cost.seconds()}
                store.save(loop.step + loop.steps_done, {**state, "identity": identity})

        states = RegularStates(save)

        def on_step(num_images: int) -> None:
            progress.count_images(num_images)
            progress.step()
            if loop.steps_done:
                states.after_step(done=loop.steps_done, of=loop.steps_per_epoch)

        warmup = loop.config.bilevel.warmup_epochs
        # A resumed search stops early where it had stopped before.
        # That is asked between epochs alone.
        while loop.epoch < loop.num_epochs and (
            loop.within_an_epoch or not (loop.epoch > warmup and loop.should_stop())
        ):
            scalars = loop.run_epoch(on_step)
            loop.require_agreement()
            shown: dict[str, object] = {name: scalars[of] for name, of in _SHOWN.items() if of in scalars}
            shown["skips"] = _flagged_skips(scalars["skips"])
            progress.epoch(loop.epoch, **shown)
            if run is not None:
                run.metrics.log(scalars, step=loop.step, epoch=loop.epoch, phase="search")
            states.after_epoch()
    return cost


def _flagged_skips(skips: float) -> str:
    return f"{skips:.0f} (collapsing? past {SKIP_WARNING} a cell)" if skips > SKIP_WARNING else f"{skips:.0f}"


def conclude(loop: FamilyLoop, *, recipe: RetrainConfig, cost: CostMeter) -> SearchResult:
    """Draw, score and choose candidates, and measure how lambda steers.

    Args:
        recipe: For the optional brief training of candidates.
        cost: The loop's meter; the scoring is counted on.
    """
    config, report = loop.config, {}
    pool = draw_pool(loop)
    if isinstance(loop, SearchLoop):
        report["supernet_val_accuracy"] = loop.measure(num_images=2000)["val_accuracy"]
    if isinstance(loop, SearchLoop) and config.scores_candidates:
        pool, probs = score(loop, pool, recipe=recipe)
        labels = loop.scoring_images().labels.cpu().numpy()
        selected = select(probs, labels, config.candidates)
        ranking = rank(probs, labels, selected)
        report["selected_val_nll"] = nll(np.mean(probs[selected], axis=0), labels)
        tell_if_guessing(report["selected_val_nll"], probs.shape[-1], "the ensemble with inherited weights")
        report["discretisation_gap"] = report["supernet_val_accuracy"] - (pool[0].supernet_val_accuracy or 0.0)
    else:
        ranking = spread_order(pool)
    curve = diversity_curve(loop.family)
    report["entropy"] = loop.measure_family()["entropy"]
    return SearchResult(
        config=config,
        base=loop.family.base_genotype(),
        candidates=pool,
        ranking=ranking,
        curve=curve,
        family=loop.family,
        temperature=loop.family.natural_temperature,
        report={**report, **cost.seconds()},
        execution=loop.execution,
    )


def _random_deviations(config: SearchConfig, base: Genotype | None) -> SearchResult:
    """Return the regime "random" of EdgeNES: the base with k edges replaced, nothing trained or scored."""
    if base is None:
        raise UserError("Random deviations need a base to deviate from.", "Give --base RUN/genotypes.json.")
    base.require_space(config.supernet.space)
    operations = config.supernet.search_space.operations
    pool = deviation_pool(base, config.candidates, operations=operations, seed=config.seed)
    return SearchResult(
        config=config,
        base=base,
        candidates=pool,
        ranking=list(range(len(pool))),
    )


def _write_weights(loop: FamilyLoop, run: RunFolder) -> None:
    from dnas_ens.run.files import save_tensors

    save_tensors(run.file("hypernetwork.safetensors"), loop.family.hypernetwork.state_dict())
    if isinstance(loop, SearchLoop):
        save_tensors(run.file("supernet.safetensors"), loop.supernet.state_dict())


def _draw_result(result: SearchResult, run: RunFolder) -> None:
    """Draw the members' cells and the curve, as files and in TensorBoard."""
    from dnas_ens.figures.cells import save_cells
    from dnas_ens.figures.style import save_svg

    save_cells(result.base, run.file("cells/base.svg"), title="Base")
    for member, genotype in enumerate(result.genotypes):
        title = f"Member {member}"
        figure = save_cells(genotype, run.file(f"cells/member-{member}.svg"), title=title)
        run.metrics.add_figure("cells", figure, step=member, phase="members")
    if result.curve is not None:
        figure = result.plot()
        save_svg(figure, run.file("cells/diversity.svg"), title="How lambda steers diversity")
        run.metrics.add_figure("diversity", figure, step=0, phase="search")
