"""The configuration: frozen dataclasses, one for each concern.

Every field is a command-line flag and a key of ``--config FILE``. Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from dnas_ens.errors import UserError
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import SpaceName, check_partial_channels, rules_of

Preset = Literal["smoke", "micro", "fast", "paper"]
Regime = Literal["star", "optimal", "edges", "random", "hypernet", "js"]
PENALTIES = Literal["js-pairwise", "js-predictive", "js-pairwise+js-predictive", "js-base", "edge-overlap", "none"]
PRECISION = Literal["auto", "measured", "float32", "bfloat16"]
LAYOUT = Literal["auto", "measured", "channels_last", "contiguous"]
CUDA_GRAPH = Literal["auto", "on", "off"]
Engine = Literal["local", "ray"]


def require(condition: bool, cause: str, remedy: str) -> None:
    """Raise a ``UserError`` unless the condition holds."""
    if not condition:
        raise UserError(cause, remedy)


#: Precision of the prior over the weights that weight decay stands for, and the least and most decay (docs/log.md):
#: that of DARTS on its 50,000 images, and what even a few hundred bear.
PRIOR_PRECISION, WEIGHT_DECAYS = 8.0, (3e-4, 1e-2)
#: The cosine ends at this share of the learning rate where the last weights are averaged (docs/log.md).
AVERAGED_RATE = 0.25
#: What numbers must be: the test, how it is said, and what to give instead.
_RULES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "positive": (lambda number: number > 0, "it must be positive", "a value above 0"),
    "from_zero": (lambda number: number >= 0, "it cannot be negative", "0 or more"),
    "share": (lambda number: 0 <= number < 1, "it must be in [0, 1)", "such a value"),
}


def _check(config: Any, **names: str) -> None:
    """Check that all numbers of a section are finite, and the named fields by their rule of `_RULES`."""
    for each in fields(config):
        value = getattr(config, each.name)
        flag = "--" + each.name.replace("_", "-")
        # JSON and the command line both accept NaN and infinity. An infinite gradient norm clips nothing.
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if type(number) is float]
        finite = each.name == "gradient_clip" or all(map(math.isfinite, numbers))
        require(finite, f"{flag} is {value}.", f"Give {flag} a finite number.")
    for rule, named in names.items():
        fits, wanted, instead = _RULES[rule]
        for name in named.split():
            value = getattr(config, name)
            flag = "--" + name.replace("_", "-")
            # None leaves the choice to what the field is for.
            fitting = value is None or all(map(fits, value if isinstance(value, tuple) else (value,)))
            require(fitting, f"{flag} is {value}; {wanted}.", f"Give {flag} {instead}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    data: str = "digits"
    """digits, fashion-mnist, mnist, cifar10, cifar100, svhn, or a path to a folder of images."""
    data_root: Path | None = None
    """Folder of the data sets, also for downloads; default $DNAS_ENS_DATA or ~/.cache/dnas_ens/data."""
    limit_train: int | None = None
    """Use a stratified subset of this many training images; val and test stay whole."""
    image_size: int | None = None
    """Side in pixels to which images are resized; default: their own, in a folder the median, but 64 at most."""
    split_seed: int = 0
    """Seed of the stratified splits."""
    skip_bad_images: bool = False
    """Leave out unreadable files of a folder instead of refusing the folder."""
    flip: bool | None = None
    """Mirror training images left to right at random, or --no-flip; default: yes, unless class names such as left and
    right say that a mirror image means something else."""
    trunk: str | None = None
    """Stand on the first stages of a pretrained network, frozen and computed once: a classifier of torchvision, such as
    resnet18, with its own weights, or NAME:FILE.safetensors. Pictures then have 224 pixels a side by default."""
    trunk_stride: int = 16
    """What those stages divide the sides of the pictures by, at most: 8 keeps fewer of them, 32 nearly all."""
    fine_tune_trunk: int | None = None
    """Epochs for which the whole pretrained network is first trained on the training pictures, with a new head."""

    def __post_init__(self) -> None:
        epochs = self.fine_tune_trunk
        require(
            epochs is None or (epochs >= 1 and self.trunk is not None),
            f"--fine-tune-trunk is {epochs}" + (", and there is no trunk." if self.trunk is None else "."),
            "Give it 1 epoch or more, and --trunk a network such as resnet18.",
        )

    def how_to_load(self) -> dict[str, Any]:
        """Return all but the data themselves, as arguments of `dnas_ens.data.load_data`."""
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "data"}
        return {"seed": options.pop("split_seed"), **options}


@dataclass(frozen=True, kw_only=True)
class SupernetConfig:
    """The space and the supernet."""

    num_cells: int = 3
    """Cells in the stack; reduction cells are at one and two thirds of it."""
    space: SpaceName = "efficient"
    """efficient: operations of one kernel, among them plain convolutions, and cells of one input, so that a network
    trains fast; darts: operations and cells as published by DARTS. It sets the defaults of the next four."""
    channels: int | None = None
    """C, channels of the first cell; default: 16 (darts: 8)."""
    num_nodes: int | None = None
    """N, intermediate nodes of a cell; default: 3 (darts: 4)."""
    operations: tuple[str, ...] | None = None
    """Candidate operations, by registered name; default: those of the space."""
    stem_stride: int | None = None
    """What the stem divides the sides of the images by, 1, 2 or 4 (darts: 1 or 4); default: 1 below 24 pixels, 2 up to
    64 pixels, 4 above (darts: 1 up to 64 pixels, 4 above)."""
    partial_channels: int = 1
    """K: 1/K of a node's channels go through the operations, the rest passes by (PC-DARTS); 1 for all. For darts."""
    form: Literal["fast", "reference"] = "fast"
    """How it is computed: edges together by source, or one operation at a time; the result is the same."""

    def __post_init__(self) -> None:
        _check(self, positive="num_cells channels num_nodes stem_stride partial_channels")
        check_partial_channels(self.space, self.partial_channels)

    @property
    def num_channels(self) -> int:
        """C: as given, or the space's own."""
        return rules_of(self.space).channels if self.channels is None else self.channels

    @property
    def search_space(self) -> SearchSpace:
        """The space of its stack, with operations and nodes as given or the space's own."""
        return SearchSpace.for_stack(
            self.num_cells, name=self.space, operations=self.operations, num_nodes=self.num_nodes
        )


@dataclass(frozen=True, kw_only=True)
class HypernetworkConfig:
    """The map from lambda and direction to an architecture."""

    hypernetwork: Literal["star", "mlp"] = "star"
    """star: piecewise-linear paths that leave the base; mlp: a small perceptron."""
    directions: int = 5
    """R, paths that start from the base."""
    num_knots: int = 5
    """K, knots of a path."""
    max_lambda: float = 0.8
    """Largest lambda: a distance in [0, 1], or a number of shared edges for edge-overlap."""
    lambda_margin: float = 0.05
    """How far lambda is drawn beyond both ends of its range, before it is clipped to it."""
    train_knot_positions: bool = False
    """Learn where on the lambda axis the inner knots stand."""
    base: Path | None = None
    """A given base: plain-cnn or resnet; a file of a genotype (JSON, or as DARTS repositories print it); or the
    genotypes.json of an earlier search; default: learnt."""

    def __post_init__(self) -> None:
        _check(self, positive="directions max_lambda")
        require(self.num_knots >= 2, f"--num-knots is {self.num_knots}.", "Give --num-knots 2 or more.")
        require(self.lambda_margin >= 0, "--lambda-margin is negative.", "Give --lambda-margin 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What an architecture step minimises."""

    likelihood: Literal["member", "ensemble", "none"] = "member"
    """Mean cross-entropy of the drawn members, or -log of their averaged probability; none: the star alone, the
    penalties are minimised without a supernet and without an image."""
    penalty: PENALTIES = "js-pairwise"
    """Penalty on similarity between the drawn members."""
    penalty_weight: tuple[float, float] = (1.0, 20.0)
    """c at the first and the last step, linear in between."""
    commitment: tuple[float, float] = (0.0, 1.0)
    """Weight of the distance between members and their discretisations, at the first and the last step."""
    operation_balance: tuple[float, float] = (5.0, 5.0)
    """Weight of how unevenly the cells of a type use the operations, at the first and the last step."""
    step_time_weight: float = 0.0
    """Weight of the expected time of a member's training step, as a share of that of the uniform mixture. Above 0,
    every operation is measured on the device first. The operation balance works against it."""
    relaxation: Literal["softmax", "gumbel-softmax", "gumbel-hard"] = "softmax"
    """How logits become mixture weights; gumbel-hard: each step computes one drawn discrete path and trains weights and
    architecture on the same images (GDAS)."""
    temperature: tuple[float, float] = (1.0, 0.4)
    """Temperature at the first and the last step, linear in between."""
    drawn_members: int | None = None
    """m, members drawn for each step; default: 4, or 1 for gumbel-hard."""
    penalty_draws: int = 32
    """Points of the paths at which distances between architectures are penalised; they need no images."""
    passes: Literal["slices", "separate"] = "slices"
    """One pass over a batch of m slices (shared BatchNorm statistics), or m separate passes, as always for
    gumbel-hard."""
    predictive_scale: float = 0.3
    """Distance between predictions asked for per unit of lambda (js-predictive)."""
    base_smoothing: float = 0.1
    """tau, the share of uniform probability mixed into a given base."""
    fixed_lambda: float | None = None
    """Draw this lambda only."""

    def __post_init__(self) -> None:
        _check(self, positive="penalty_draws", from_zero="penalty_weight commitment operation_balance step_time_weight")
        require(self.num_drawn > 0, f"--drawn-members is {self.drawn_members}.", "Give --drawn-members 1 or more.")
        require(min(self.temperature) > 0, "A temperature of 0 divides by it.", "Give --temperature above 0.")
        require(
            self.likelihood != "none" or (self.penalty != "none" and "predictive" not in self.penalty),
            f"Without images the penalty {self.penalty} has nothing to compare.",
            "Give --penalty js-pairwise, js-base or edge-overlap, or leave out --likelihood none.",
        )
        require(
            0 < self.base_smoothing < 1,
            f"--base-smoothing is {self.base_smoothing}.",
            "Give --base-smoothing between 0 and 1.",
        )

    @property
    def hard(self) -> bool:
        """Whether each step computes discrete paths."""
        return self.relaxation == "gumbel-hard"

    @property
    def num_drawn(self) -> int:
        """m, members drawn for each step."""
        return (1 if self.hard else 4) if self.drawn_members is None else self.drawn_members


@dataclass(frozen=True, kw_only=True)
class BilevelConfig:
    """How supernet and hypernetwork are trained."""

    epochs: int = 20
    """Epochs over the weight half of the training images."""
    warmup_epochs: int = 2
    """First epochs that train the weights alone."""
    star_steps: int = 500
    """Steps of a search by the star alone (--likelihood none), which has no epochs."""
    batch_size: int = 64
    """Images of a weight step and of an architecture step."""
    learning_rate: float = 0.05
    """SGD learning rate of the weights, annealed by a cosine to --min-learning-rate."""
    min_learning_rate: float = 0.001
    """Learning rate at the end."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 3e-4
    """Weight decay of the weights."""
    gradient_clip: float = 5.0
    """Largest gradient norm of a weight step."""
    architecture_learning_rate: float = 0.03
    """Adam learning rate of the hypernetwork."""
    architecture_weight_decay: float = 1e-3
    """Weight decay of the hypernetwork."""
    second_order: bool = False
    """Differentiate through one weight step (DARTS second order) instead of the first-order step."""
    augment: bool = True
    """Pad-crop and, where it keeps the meaning, flip the training images."""
    auxiliary_skip: float = 0.0
    """Weight of an extra skip on every edge, decayed linearly to 0 (DARTS-)."""
    max_skips: int | None = None
    """Stop early once a base cell holds more skip connections than this (DARTS+)."""
    precision: PRECISION = "auto"
    """float32 (never TF32), bfloat16 (autocast), or measured: the faster in a short trial. auto: bfloat16 on a GPU that
    computes in it, else float32."""
    layout: LAYOUT = "auto"
    """Memory layout, or measured likewise; the fast form of the supernet is always channels_last."""
    cuda_graph: CUDA_GRAPH = "auto"
    """Record a step once and replay it as a CUDA graph. auto: on a GPU, where the step can be recorded."""

    def __post_init__(self) -> None:
        _check(
            self,
            positive="epochs star_steps batch_size learning_rate architecture_learning_rate gradient_clip",
            share="momentum",
            from_zero="min_learning_rate weight_decay architecture_weight_decay auxiliary_skip",
        )
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"{self.warmup_epochs} warm-up epochs leave none of {self.epochs} for the search.",
            "Give --warmup-epochs less than --epochs.",
        )


@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """From the hypernetwork to the members of the ensemble."""

    members: int = 5
    """M, members of the ensemble."""
    pool_size: int = 30
    """Candidates drawn from the hypernetwork before duplicates are dropped."""
    edges_per_node: int = 2
    """Incoming edges a node keeps (EdgeNES: 1); in the space efficient one to so many, as the search decides."""
    selection: Literal["greedy", "greedy-replacement", "exhaustive"] = "greedy"
    """How M candidates are chosen on the ensemble's validation NLL with inherited weights."""
    candidate_epochs: int = 0
    """Train every candidate this long with its inherited weights before it is scored."""
    score_images: int | None = None
    """Validation images that candidates are scored on; default: at most as many as the search trains weights on; 0:
    they are not scored, and ranked by how far they lie apart."""
    replaced_edges: int = 3
    """Edges of the base replaced at random in each candidate (regime random)."""

    def __post_init__(self) -> None:
        _check(self, positive="members pool_size edges_per_node", from_zero="candidate_epochs replaced_edges")
        require(
            self.score_images is None or self.score_images >= 0,
            f"--score-images is {self.score_images}.",
            "Give --score-images 0 or more.",
        )
        require(
            self.members <= self.pool_size,
            f"{self.members} members are more than the {self.pool_size} candidates they are chosen from.",
            "Raise --pool-size or lower --members.",
        )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """One search: everything that decides its result."""

    preset: Preset = "smoke"
    """Scale; sets the defaults of the fields below."""
    regime: Regime = "star"
    """Method; sets the defaults of the fields below. star, this project's own: several paths from a learnt base;
    optimal: one architecture (DARTS); edges: one that shares a number of edges with --base; random: edges of --base
    replaced at random; hypernet: one path, lambda counts shared edges; js: one path, lambda weighs a Jensen-Shannon
    divergence from the base (EdgeNES)."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and draws."""
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    supernet: OmitArgPrefixes[SupernetConfig] = field(default_factory=SupernetConfig)
    hypernetwork: OmitArgPrefixes[HypernetworkConfig] = field(default_factory=HypernetworkConfig)
    objective: OmitArgPrefixes[ObjectiveConfig] = field(default_factory=ObjectiveConfig)
    bilevel: OmitArgPrefixes[BilevelConfig] = field(default_factory=BilevelConfig)
    candidates: OmitArgPrefixes[CandidateConfig] = field(default_factory=CandidateConfig)

    @property
    def recordable(self) -> bool:
        """Whether a step can be replayed as a CUDA graph: it draws nothing and reads no value from the device."""
        return not self.bilevel.second_order and "gumbel" not in self.objective.relaxation and self.reads_images

    @property
    def reads_images(self) -> bool:
        """Whether there is a likelihood; the star alone has none."""
        return self.objective.likelihood != "none"

    @property
    def scores_candidates(self) -> bool:
        """Whether candidates are scored with inherited weights, which the star alone does not have."""
        return self.reads_images and self.candidates.score_images != 0

    def __post_init__(self) -> None:
        _check(self, from_zero="seed")
        given = self.hypernetwork.base is not None
        require(
            given or (self.objective.penalty != "edge-overlap" and self.regime not in ("edges", "random")),
            f"The regime {self.regime} with penalty {self.objective.penalty} compares with a given base.",
            "Search one with --regime optimal, then give --base RUN/genotypes.json.",
        )
        if self.objective.penalty.startswith("js-p"):
            require(
                self.hypernetwork.max_lambda <= 1,
                f"--max-lambda is {self.hypernetwork.max_lambda}, but {self.objective.penalty} reads lambda "
                "as a distance in [0, 1].",
                "Give --max-lambda 1 or less.",
            )
        require(
            self.supernet.form == "reference" or self.objective.hard or self.bilevel.layout != "contiguous",
            "The fast form of the supernet is computed channels_last.",
            "Leave --layout out, or give --form reference.",
        )
        require(
            self.bilevel.cuda_graph != "on" or self.recordable,
            "Second-order steps, the noise of gumbel-softmax and gumbel-hard, and the star alone cannot be replayed as "
            "a CUDA graph.",
            "Leave --cuda-graph out.",
        )
        require(
            not (self.objective.hard and self.bilevel.second_order),
            "With gumbel-hard one step trains weights and architecture, so that there is no second order.",
            "Leave out --second-order or --relaxation gumbel-hard.",
        )
        require(
            self.reads_images or not self.candidates.candidate_epochs,
            "The star alone has no weights that candidates could be trained with.",
            "Leave out --candidate-epochs, or --likelihood none.",
        )
        num_drawn, penalty = self.objective.num_drawn, self.objective.penalty
        require(
            not (self.objective.hard and "predictive" in penalty),
            "With gumbel-hard one step trains weights and architecture, and a penalty on predictions would train the "
            "weights to disagree.",
            "Give --relaxation softmax, or --penalty js-pairwise.",
        )
        require(
            num_drawn > 1 or (self.objective.likelihood != "ensemble" and "predictive" not in penalty),
            f"One member is drawn for a step, and --likelihood {self.objective.likelihood} with --penalty {penalty} "
            "is about several.",
            "Give --drawn-members 4.",
        )
        if self.bilevel.batch_size % num_drawn:
            raise UserError(
                f"{num_drawn} drawn members do not divide a batch of {self.bilevel.batch_size} images.",
                f"Give --batch-size a multiple of {num_drawn}.",
            )


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """The recipe a genotype is trained from scratch with."""

    num_cells: int = 3
    """Cells in the stack."""
    channels: int = 16
    """C, channels of the first cell."""
    stem_stride: int | None = None
    """What the stem divides the sides of the images by, 1, 2 or 4 (darts: 1 or 4); default: as in the search."""
    epochs: int = 30
    """Epochs over all the training images."""
    batch_size: int = 64
    """Images of a step."""
    learning_rate: float = 0.05
    """SGD learning rate, annealed by a cosine to a quarter, or to 0 where no weights are averaged."""
    average_last: float = 0.25
    """Share of the epochs, the last ones, in which the weights after every step are averaged into the network's; less
    than one epoch averages none."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float | None = None
    """Weight decay; default: 8 over the number of training images, from 0.0003 to 0.01."""
    gradient_clip: float = 5.0
    """Largest gradient norm."""
    label_smoothing: float = 0.0
    """Share of uniform probability in the targets."""
    drop_path: float = 0.0
    """Drop-path probability at the end; it rises linearly from 0."""
    auxiliary_weight: float = 0.0
    """Weight of the auxiliary head's loss; 0 builds no head."""
    cutout: int = 0
    """Side of the square cut out of training images, in pixels; 0 cuts none."""
    augment: bool = True
    """Pad-crop and, where it keeps the meaning, flip the training images."""
    balance: Literal["none", "sampling", "weights"] = "none"
    """Where some classes have few images: draw images so that all classes come equally often, or weigh the loss so that
    they count equally."""
    cycles: int = 0
    """Further networks of each member: cosine cycles that go on from its end, each kept where it ends. How many of the
    last ones join the ensemble is chosen on val."""
    cycle_epochs: int = 5
    """Epochs of a cycle."""
    cycle_learning_rate: float = 0.05
    """Learning rate a cycle begins with."""
    branches: bool = False
    """Begin every cycle from the member's end instead of from the cycle before it."""
    seed: int = 0
    """Root of the members' separate seeds for initialisation, order and augmentation."""
    precision: PRECISION = "auto"
    """float32 (never TF32), bfloat16 (autocast), or measured: the faster in a short trial. auto: bfloat16 on a GPU that
    computes in it, else float32."""
    layout: LAYOUT = "auto"
    """Memory layout of images and convolutions, or measured likewise; auto: channels_last."""
    cuda_graph: CUDA_GRAPH = "auto"
    """Record a step once and replay it as a CUDA graph. auto: on a GPU, where the step can be recorded."""

    def for_images(self, count: int) -> RetrainConfig:
        """Return it with the weight decay for so many training images, unless it has one of its own.

        A normal prior of precision a over the weights adds a/2 |w|^2 to the sum of all images' losses, and so a/N to
        the decay of their mean.
        """
        if self.weight_decay is not None:
            return self
        least, most = WEIGHT_DECAYS
        return replace(self, weight_decay=min(most, max(least, PRIOR_PRECISION / count)))

    def with_stem_of(self, search: SearchConfig) -> RetrainConfig:
        """Return it with the stem of the search, unless it has one of its own."""
        return self if self.stem_stride is not None else replace(self, stem_stride=search.supernet.stem_stride)

    def __post_init__(self) -> None:
        _check(
            self,
            positive="num_cells channels stem_stride epochs batch_size learning_rate gradient_clip cycle_epochs "
            "cycle_learning_rate",
            share="label_smoothing drop_path momentum average_last",
            from_zero="weight_decay auxiliary_weight cutout cycles seed",
        )

    @property
    def epochs_in_all(self) -> int:
        """Epochs of a member with its cycles."""
        return self.epochs + self.cycles * self.cycle_epochs

    def of_base(self) -> RetrainConfig:
        """Return the recipe without cycles: what the first network of every member is trained with."""
        plain = RetrainConfig()
        return replace(
            self,
            cycles=plain.cycles,
            cycle_epochs=plain.cycle_epochs,
            cycle_learning_rate=plain.cycle_learning_rate,
            branches=plain.branches,
        )

    def of_cycle(self) -> RetrainConfig:
        """Return the recipe of one cycle."""
        return replace(self.of_base(), epochs=self.cycle_epochs, learning_rate=self.cycle_learning_rate)
