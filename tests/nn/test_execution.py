import copy
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import genotype, same, stack, supernet_pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnas_ens.config import RetrainConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.errors import UserError
from dnas_ens.nn.depthwise import depthwise_conv
from dnas_ens.nn.execution import PLAIN, Execution, candidates, fastest
from dnas_ens.nn.fast_supernet import FastSupernet
from dnas_ens.nn.moments import PointwiseNorm, grouped_pointwise, moments
from dnas_ens.run.progress import CostMeter
from dnas_ens.search.family import ArchitectureFamily
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.run import conclude
from dnas_ens.search.steps import Schedules, SearchSteps
from dnas_ens.space.spaces import DARTS_OPERATIONS
from dnas_ens.training.trainer import MemberTraining

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BFLOAT16 = Execution(precision="bfloat16")
#: Relative rounding of bfloat16 (eight significant bits).
EPSILON = 2.0**-8
FOUR = ("channels_last float32", "channels_last bfloat16", "contiguous float32", "contiguous bfloat16")


@pytest.mark.parametrize(
    ("layout", "precision", "device", "more", "expected"),
    [
        ("auto", "auto", CPU, {}, FOUR[:1]),
        ("measured", "measured", CPU, {}, FOUR),
        ("measured", "measured", GPU, {"layouts": ("channels_last",)}, FOUR[:2]),
        ("auto", "float32", GPU, {"cuda_graph": "auto"}, ("channels_last float32 CUDA graph",)),
        ("auto", "float32", GPU, {"cuda_graph": "auto", "recordable": False}, FOUR[:1]),
    ],
)
def test_what_settings_leave_open(layout, precision, device, more, expected):
    found = candidates(layout=layout, precision=precision, device=device, **more)
    assert tuple(map(str, found)) == expected


def test_the_trial_takes_the_fastest_and_leaves_the_random_stream(capsys):
    slow, fast = candidates(layout="auto", precision="measured", device=CPU)
    built = []

    def build_step(choice):
        built.append(choice)
        torch.rand(3)
        return lambda: time.sleep(0.1 if choice == slow else 0.0)

    state = torch.get_rng_state()
    assert fastest([slow, fast], build_step, device=CPU, rounds=3) == fast
    assert torch.equal(torch.get_rng_state(), state)
    assert built == [slow, fast]
    assert f"taking {fast}" in capsys.readouterr().err
    assert fastest([BFLOAT16], lambda _: pytest.fail("timed"), device=CPU) == BFLOAT16

    def build_failing(choice):
        def step():
            if choice == fast:
                raise RuntimeError("no kernel for it\nand more")

        return step

    assert fastest([slow, fast], build_failing, device=CPU) == slow
    assert f"{fast} does not run here: no kernel for it\n" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no kernel"):
        fastest([fast, replace(fast, layout="contiguous")], lambda _: build_failing(fast), device=CPU)


def test_norm_under_autocast_keeps_weights_and_statistics():
    torch.manual_seed(0)
    norm = PointwiseNorm(2, 3)
    torch.nn.init.normal_(norm.pointwise)
    features = torch.randn(4, 6, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    with BFLOAT16.autocast(CPU):
        matrices, shifts = norm.matrices(features)
        result = grouped_pointwise(features, matrices, shifts)
    assert matrices.dtype == shifts.dtype == norm.running_mean.dtype == torch.float32
    assert result.dtype == torch.bfloat16
    plain = torch.nn.BatchNorm2d(6, affine=False)
    expected = plain(F.conv2d(features.float(), norm.pointwise.reshape(6, 3, 1, 1), groups=2))
    torch.testing.assert_close(result.float(), expected, rtol=2 * EPSILON, atol=2 * EPSILON)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    # A mean of 8 and a deviation of 1: bfloat16 sums would be off by tenths.
    for found, expected in zip(moments(features + 8, 2), moments((features + 8).double(), 2), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_supernet_under_autocast_rounds_and_nothing_else():
    net = supernet_pair(operations=DARTS_OPERATIONS, num_nodes=2, in_channels=1, num_classes=3)[1].float()
    images = torch.randn(32, 1, 8, 8)

    def outcome(execution):
        mixture = torch.rand(4, *net.space.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with execution.autocast(CPU):
            logits = net(execution.place(images), mixture)
        loss = F.cross_entropy(logits.float(), torch.arange(32) % 3)
        net.zero_grad()
        loss.backward()
        weights = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
        assert mixture.grad.dtype == weights.dtype == torch.float32
        return logits, mixture.grad.flatten(), weights

    (logits, *gradients), (exact_logits, *exact) = outcome(BFLOAT16), outcome(PLAIN)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact_logits, rtol=0, atol=32 * EPSILON)
    for found, expected in zip(gradients, exact, strict=True):
        assert F.cosine_similarity(found, expected, dim=0) > 0.97
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in net.buffers())


def test_a_search_in_bfloat16_goes_on_in_it(few_digits, tiny_search):
    config = with_fields(tiny_search, precision="bfloat16")
    straight = SearchLoop(config, few_digits)
    first = straight.run_epoch()
    plain = SearchLoop(tiny_search, few_digits).run_epoch()
    assert first["train_loss"] != plain["train_loss"]
    assert first["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)
    resumed = SearchLoop(tiny_search, few_digits)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert resumed.run_epoch() == straight.run_epoch()


def test_a_measured_search_says_what_it_took(few_digits, tiny_search, capsys):
    loop = SearchLoop(with_fields(tiny_search, precision="measured", form="reference"), few_digits)
    loop._settle_execution()
    assert f"taking {loop.steps.execution}\n" in capsys.readouterr().err
    found = conclude(loop, recipe=RetrainConfig(), cost=CostMeter())
    assert found.to_dict()["execution"] == loop.steps.execution.to_dict()


@pytest.mark.parametrize(
    ("way", "tolerance"), [({"precision": "bfloat16"}, 0.1), ({"layout": "contiguous"}, 1e-4)], ids=str
)
def test_a_member_learns_as_well_in_another_precision_or_layout(few_digits, way, tolerance):
    recipe = RetrainConfig(num_cells=1, channels=4, batch_size=16, epochs=3)
    plain, other = (
        MemberTraining(genotype(), few_digits, with_fields(recipe, **fields), index=0) for fields in ({}, way)
    )
    losses = [[training.run_epoch()["train_loss"] for _ in range(2)] for training in (plain, other)]
    assert not same(plain.network.state_dict(), other.network.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


# At usual learning rates a difference by rounding grows tenfold a step: two eager runs in float32 differ by 0.3 after
# twenty (experiments/results/gpu.md). At small ones it stays small, and another batch or draw is seen all the same.
@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_replayed_search_steps_are_the_steps_themselves(few_digits, tiny_search, precision, tolerance):
    rates = {"learning_rate": 1e-3, "architecture_learning_rate": 1e-3, "warmup_epochs": 0}
    config = with_fields(tiny_search, precision=precision, penalty="js-pairwise+js-predictive", **rates)
    plain, replayed = (
        SearchLoop(with_fields(config, cuda_graph=graph), few_digits, device=GPU) for graph in ("off", "on")
    )
    for _ in range(3):
        expected, found = plain.run_epoch(), replayed.run_epoch()
        for name in ("architecture_loss", "train_loss"):
            assert found[name] == pytest.approx(expected[name], abs=tolerance)


@pytest.mark.gpu
def test_a_recorded_search_goes_on(digits, tiny_search):
    config = with_fields(tiny_search, cuda_graph="on")
    straight = SearchLoop(config, digits, device=GPU)
    for _ in range(config.bilevel.epochs):
        straight.run_epoch()
    resumed = SearchLoop(with_fields(config, cuda_graph="off"), digits, device=GPU)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert resumed.steps.execution.cuda_graph
    resumed.run_epoch()


@pytest.mark.gpu
def test_replayed_training_steps_are_the_steps_themselves(few_digits):
    way = {"precision": "float32", "layout": "channels_last", "drop_path": 0.2, "learning_rate": 1e-3}
    recipe = RetrainConfig(num_cells=1, channels=4, epochs=4, batch_size=24, **way)
    losses = []
    for graph in ("off", "on"):
        chosen = with_fields(recipe, cuda_graph=graph)
        training = MemberTraining(genotype(), few_digits, chosen, index=0, device=GPU)
        losses.append([training.run_epoch()["train_loss"] for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.gpu
def test_a_gpu_takes_what_is_fast_there(few_digits, tiny_search, capsys):
    loop = SearchLoop(tiny_search, few_digits, device=GPU)
    loop.run_epoch()
    assert loop.steps.execution == Execution(precision="bfloat16", cuda_graph=True)
    gumbel = SearchLoop(with_fields(tiny_search, relaxation="gumbel-softmax"), few_digits, device=GPU)
    assert not gumbel.steps.execution.cuda_graph
    assert not capsys.readouterr().err
    measured = SearchLoop(with_fields(tiny_search, precision="measured"), few_digits, device=GPU)
    measured.run_epoch()
    assert f"taking {measured.steps.execution}\n" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "channels", "tolerance"),
    [(torch.float64, 4, 1e-8), (torch.float32, 4, 1e-3), (torch.float32, 16, 1e-3)],
)
def test_a_gpu_steps_as_the_reference_on_a_cpu(dtype, channels, tolerance):
    reference, fast = supernet_pair(operations=DARTS_OPERATIONS, num_nodes=2, in_channels=1, channels=channels)
    fast = PLAIN.place_module(fast.to(dtype), GPU)
    images = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    mixture = torch.rand(4, *reference.space.shape, dtype=torch.float64)
    gradients = []
    for net in (reference, fast):
        first = next(net.parameters())
        weights = mixture.clone().to(first).requires_grad_()
        net(images.to(first), weights).square().mean().backward()
        gradients.append(weights.grad.double().cpu())
    scale = float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance * scale)
    for name, value in fast.state_dict().items():
        expected = reference.state_dict()[name]
        torch.testing.assert_close(value.to(expected).cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "dilation", "stride"), [(3, 1, 1), (5, 2, 2)])
def test_depthwise_kernels_of_a_gpu(side, dilation, stride, precision):
    torch.manual_seed(0)
    images = torch.randn(4, 16, 9, 8).to(precision).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3 * 16, 1, side, side).to(precision)
    outcomes = []
    for device, dtype in ((CPU, torch.float64), (GPU, precision)):
        inputs = [tensor.clone().to(device, dtype).requires_grad_() for tensor in (images, weight)]
        result = depthwise_conv(*inputs, stride=stride, dilation=dilation)
        outcomes.append([result, *torch.autograd.grad(result.square().sum(), inputs)])
    for expected, found in zip(*outcomes, strict=True):
        difference = torch.linalg.vector_norm(found.double().cpu() - expected)
        limit = 1e-5 if precision == torch.float32 else 2 * EPSILON
        assert difference <= limit * torch.linalg.vector_norm(expected)


def test_cuda_graphs_are_refused_where_there_are_none(few_digits, tiny_search):
    with pytest.raises(UserError, match="do not run on the device cpu"):
        SearchLoop(with_fields(tiny_search, cuda_graph="on"), few_digits).run_epoch()


class _Operations(TorchDispatchMode):
    """Counts operations, and collects those that on a GPU would make the host wait, or copy from it."""

    WAITING = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.count, self.waiting = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if name.startswith(self.WAITING) or len(devices) > 1:
            self.waiting.append(name)
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def steps_on_meta(config):
    """The two updates of a search on a device that computes nothing but shapes, and their operations."""
    family = ArchitectureFamily(config, device="meta")
    size = stack(config.supernet.num_cells, channels=config.supernet.channels, num_classes=10)
    parts = {"config": config, "family": family, "supernet": FastSupernet(family.space, size).to("meta")}
    steps = SearchSteps(**parts, generator=torch.Generator(), schedules=Schedules(config, 3))
    # Adam counts its steps on the host where it is not recorded, and on no device but a real one otherwise.
    steps.architecture_optimizer = torch.optim.SGD(steps.architecture, lr=0.1)
    steps.begin_epoch(steps.schedules, num_pairs=0)
    members, penalised = steps._draw(), steps._draw()
    batch = torch.empty(64, 1, 28, 28, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    points = *vars(members).values(), *vars(penalised).values()
    counts = []
    for update, given in ((steps._weight_update, points[:2]), (steps._architecture_update, points)):
        # The first step makes the state of the optimiser.
        update(*batch, *given)
        with _Operations() as operations:
            update(*batch, *given)
        counts.append(operations)
    return counts


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        # Each is a launch of some microseconds where steps are not recorded; found are 8,117 and 6,671.
        ({}, (8500, 7000)),
        ({"penalty": "js-base", "hypernetwork": "mlp", "num_nodes": 1}, ()),
        ({"penalty": "js-pairwise+js-predictive", "likelihood": "ensemble", "num_nodes": 1}, ()),
        ({"train_knot_positions": True, "operations": ("none", "skip_connect", "max_pool_3x3")}, ()),
    ],
    ids=str,
)
def test_no_step_of_the_search_mixes_host_and_device(fields, limits):
    weights, architecture = steps_on_meta(with_fields(search_preset("fast", space="darts"), **fields))
    assert not weights.waiting + architecture.waiting
    assert not limits or (weights.count < limits[0] and architecture.count < limits[1])
    with _Operations() as operations:
        torch.empty(3, device="meta")[torch.tensor([0, 1])]
    assert "index" in operations.waiting


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_state_of_a_gpu_goes_on_without_graphs_on_a_cpu(few_digits, device):
    recipe = RetrainConfig(num_cells=1, channels=2, epochs=2, batch_size=32)
    training = MemberTraining(genotype(0), few_digits, recipe, index=0)
    training.run_epoch()
    state = training.state_dict()
    state["execution"] = Execution(cuda_graph=True).to_dict()
    # Seed and offset, as a GPU's generator has them.
    state["augmentation"] = torch.arange(16, dtype=torch.uint8)
    assert Execution(**state["execution"]).on(torch.device(device)).cuda_graph == (device == "cuda")
    again = MemberTraining(genotype(0), few_digits, recipe, index=0)
    again.load_state_dict(state)
    assert not again.execution.cuda_graph
    again.run_epoch()
