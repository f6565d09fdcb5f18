import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import supernet
from torch import nn

from dnas_ens.config import SearchConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.nn import batched_edges, moments
from dnas_ens.nn.fast_supernet import FastSupernet
from dnas_ens.nn.operations import _REGISTRY, register_operation
from dnas_ens.search.loop import SearchLoop
from dnas_ens.space.search_space import DARTS_OPERATIONS

WITH_NONE = ("none", *DARTS_OPERATIONS)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def pair(*, operations=WITH_NONE, num_cells=3, num_nodes=3, channels=4, dtype=torch.float64, **options):
    reference = supernet(
        num_cells, operations=operations, num_nodes=num_nodes, channels=channels, **options
    ).to(dtype)
    return reference, FastSupernet.from_reference(reference)


def random_mixture(space, slices, dtype):
    shape = space.shape if slices is None else (slices, *space.shape)
    return torch.rand(shape, dtype=dtype) / len(space.operations)


def named_gradients(net):
    """Gradients under the reference's names, a fast supernet's by way of its own state_dict."""
    if not isinstance(net, FastSupernet):
        return {name: parameter.grad for name, parameter in net.named_parameters()}
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.grad)
        found = {
            name: value.clone() for name, value in net.state_dict().items() if not name.endswith(STATISTICS)
        }
        for parameter, value in zip(net.parameters(), before, strict=True):
            parameter.copy_(value)
    return found


def one_step(net, images, mixture):
    mixture = mixture.clone().requires_grad_()
    logits = net(images, mixture)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(images)) % 5).backward()
    statistics = {name: value for name, value in net.state_dict().items() if name.endswith(STATISTICS)}
    return {"logits": logits.detach(), "mixture": mixture.grad} | named_gradients(net) | statistics


def assert_same_step(reference, fast, images, mixture, *, tolerance):
    expected, found = one_step(reference, images, mixture), one_step(fast, images, mixture)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # Relative to the tensor's largest entry: sums of many terms cancel.
        scale = max(1.0, float(value.abs().max()))
        difference = float((found[name].double() - value.double()).abs().max())
        assert difference <= tolerance * scale, (name, difference, scale)


@pytest.mark.parametrize(
    "operations", [WITH_NONE, DARTS_OPERATIONS, ("max_pool_3x3",), ("skip_connect", "dil_conv_5x5")], ids=len
)
@pytest.mark.parametrize("slices", [None, 1, 3])
@pytest.mark.parametrize("form", ["edge by edge", "edges together", "dense on a GPU", "batched on a GPU"])
def test_fast_equals_reference_in_double_precision(operations, slices, form, monkeypatch):
    if form == "edge by edge":
        monkeypatch.setattr(batched_edges, "NARROW", 0)
        monkeypatch.setattr(batched_edges, "SMALL", 0)
    if form.endswith("GPU"):
        monkeypatch.setattr(moments, "suits_large_products", lambda features: True)
    if form == "batched on a GPU":
        monkeypatch.setattr(moments, "DENSE_PRODUCT", 0)
        monkeypatch.setattr(moments, "DENSE_GRAM", 0)
    reference, fast = pair(operations=operations)
    images = torch.randn(6, 2, 9, 9, dtype=torch.float64)
    mixture = random_mixture(reference.space, slices, torch.float64)
    assert_same_step(reference, fast, images, mixture, tolerance=1e-10)
    reference.eval(), fast.eval()
    assert_same_step(reference, fast, images, mixture, tolerance=1e-10)


@settings(max_examples=12)
@given(
    num_cells=st.integers(1, 4),
    num_nodes=st.integers(1, 4),
    channels=st.sampled_from([2, 3, 8, 16]),
    side=st.integers(4, 11),
    slices=st.sampled_from([None, 2, 4]),
)
def test_fast_equals_reference_for_any_shape(num_cells, num_nodes, channels, side, slices):
    reference, fast = pair(num_cells=num_cells, num_nodes=num_nodes, channels=channels)
    images = torch.randn(4, 2, side, side, dtype=torch.float64)
    mixture = random_mixture(reference.space, slices, torch.float64)
    # The fewer pixels a variance is taken over, the more rounding it multiplies.
    assert_same_step(reference, fast, images, mixture, tolerance=1e-8 if side < 8 else 1e-10)


@pytest.mark.parametrize("channels", [4, 8])
def test_fast_equals_reference_in_single_precision(channels):
    # In larger ones rounding takes some activation over a ReLU's zero, in either form against double precision as
    # much as between them, and its gradient with it.
    reference, fast = pair(channels=channels, num_nodes=4, dtype=torch.float32)
    images = torch.randn(16, 2, 16, 16)
    assert_same_step(
        reference, fast, images, random_mixture(reference.space, 4, torch.float32), tolerance=1e-5
    )


def test_a_large_image_takes_the_reducing_stem():
    reference, fast = pair(num_cells=1, num_nodes=2, large_images=True)
    images = torch.randn(2, 2, 32, 32, dtype=torch.float64)
    assert_same_step(
        reference, fast, images, random_mixture(reference.space, 2, torch.float64), tolerance=1e-10
    )


@pytest.mark.parametrize("partial_channels", [2, 4])
def test_fast_equals_reference_with_partial_channels(partial_channels):
    reference, fast = pair(num_cells=4, channels=8, partial_channels=partial_channels)
    images = torch.randn(6, 2, 9, 9, dtype=torch.float64)
    mixture = random_mixture(reference.space, 3, torch.float64)
    assert_same_step(reference, fast, images, mixture, tolerance=1e-10)


def test_either_form_loads_the_others_checkpoint():
    reference, fast = pair()
    images = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    mixture = random_mixture(reference.space, None, torch.float64)
    reference(images, mixture)
    fast(images + 1, mixture)
    assert list(reference.state_dict()) != []
    assert {name: value.shape for name, value in reference.state_dict().items()} == {
        name: value.shape for name, value in fast.state_dict().items()
    }
    other_reference, other_fast = pair()
    other_reference.load_state_dict(fast.state_dict())
    other_fast.load_state_dict(reference.state_dict())
    for ours, theirs in ((other_reference, fast), (other_fast, reference)):
        expected = theirs.eval()(images, mixture)
        torch.testing.assert_close(ours.eval()(images, mixture), expected, rtol=1e-10, atol=1e-10)
    wrapped = nn.Sequential(fast)
    assert "0.cells.0.edges.0.operations.1.1.running_mean" in wrapped.state_dict()
    wrapped.load_state_dict(wrapped.state_dict())


def test_an_incomplete_checkpoint_is_refused():
    reference, fast = pair()
    state = reference.state_dict()
    removed = [name for name in state if ".edges.0.operations.4." in name]
    assert removed
    with pytest.raises(RuntimeError, match=r"edges\.0\.operations\.4"):
        fast.load_state_dict({name: value for name, value in state.items() if name not in removed})


def test_an_operation_of_the_users_own_runs_edge_by_edge():
    @register_operation("scaled_conv")
    def scaled_conv(channels, stride, affine):
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride, padding=1), nn.BatchNorm2d(channels, affine=affine)
        )

    try:
        reference, fast = pair(operations=("skip_connect", "scaled_conv", "sep_conv_3x3"))
        images = torch.randn(4, 2, 8, 8, dtype=torch.float64)
        mixture = random_mixture(reference.space, 2, torch.float64)
        assert_same_step(reference, fast, images, mixture, tolerance=1e-10)
    finally:
        del _REGISTRY["scaled_conv"]


def test_fifty_search_steps_have_the_same_losses(digits):
    def losses(form):
        config = with_fields(
            SearchConfig(), channels=2, num_nodes=2, epochs=6, warmup_epochs=1, form=form, learning_rate=0.01
        )
        loop = SearchLoop(config, digits)
        # In double precision, for training multiplies rounding; both forms round differently.
        loop.supernet.double()
        images = loop.steps.member_logits
        loop.steps.member_logits = lambda batch, mixtures, **how: images(
            batch.double(), mixtures.double(), **how
        )
        loop.measure = dict
        return [loop.run_epoch() for _ in range(-(-50 // loop.steps_per_epoch))]

    fast, reference = losses("fast"), losses("reference")
    assert reference[0]["train_loss"] > reference[-1]["train_loss"]
    for ours, theirs in zip(fast, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
