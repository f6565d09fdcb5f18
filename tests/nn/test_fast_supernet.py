import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WITH_NONE, mixture, supernet_pair
from torch import nn

from dnas_ens.config import SearchConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.nn import batched_edges, moments
from dnas_ens.nn.operations import _REGISTRY, register_operation
from dnas_ens.search.loop import SearchLoop

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def named_gradients(net):
    """Gradients under the reference's names, by way of the state_dict of a copy that holds them."""
    holder = copy.deepcopy(net)
    with torch.no_grad():
        for held, parameter in zip(holder.parameters(), net.parameters(), strict=True):
            held.copy_(parameter.grad)
    return {name: value for name, value in holder.state_dict().items() if not name.endswith(STATISTICS)}


def one_step(net, images, mixture):
    mixture = mixture.clone().requires_grad_()
    logits = net(images, mixture)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(images)) % 5).backward()
    statistics = {name: value for name, value in net.state_dict().items() if name.endswith(STATISTICS)}
    return {"logits": logits.detach(), "mixture": mixture.grad} | named_gradients(net) | statistics


def check(images, slices, *, tolerance=1e-10, dtype=torch.float64, **fields):
    """Compare a step of both forms, in training and in evaluation mode."""
    reference, fast = (net.to(dtype) for net in supernet_pair(**fields))
    lead = () if slices is None else (slices,)
    weights = mixture(reference.space, *lead).to(dtype)
    for training in (True, False):
        reference.train(training), fast.train(training)
        expected, found = (one_step(net, images.to(dtype), weights) for net in (reference, fast))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            # Relative to the tensor's largest entry: sums of many terms cancel.
            scale = max(1.0, float(value.abs().max()))
            difference = float((found[name].double() - value.double()).abs().max())
            assert difference <= tolerance * scale, (name, difference, scale)


@pytest.mark.parametrize(
    ("operations", "slices"), [(WITH_NONE, 3), (("max_pool_3x3",), None), (("skip_connect", "dil_conv_5x5"), None)]
)
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
    check(torch.randn(6, 2, 9, 9), slices, operations=operations)


@settings(max_examples=8)
@given(
    num_cells=st.integers(1, 4),
    num_nodes=st.integers(1, 4),
    channels=st.sampled_from([2, 3, 8, 16]),
    side=st.integers(4, 11),
    slices=st.sampled_from([None, 2, 4]),
)
def test_fast_equals_reference_for_any_shape(num_cells, num_nodes, channels, side, slices):
    # The fewer pixels a variance is taken over, the more rounding it multiplies.
    tolerance = 1e-8 if side < 8 else 1e-10
    size = {"num_cells": num_cells, "num_nodes": num_nodes, "channels": channels}
    check(torch.randn(4, 2, side, side), slices, tolerance=tolerance, **size)


@pytest.mark.parametrize(
    ("shape", "slices", "fields"),
    [
        ((2, 2, 32, 32), 2, {"num_cells": 1, "num_nodes": 2, "stem_stride": 4}),
        ((6, 2, 9, 9), 3, {"num_cells": 4, "channels": 8, "partial_channels": 4}),
        # In larger ones rounding takes some activation over a ReLU's zero, in either form against double precision as
        # much as between them, and its gradient with it.
        ((16, 2, 16, 16), 4, {"channels": 8, "num_nodes": 4, "dtype": torch.float32, "tolerance": 1e-5}),
    ],
    ids=str,
)
def test_fast_equals_reference_in_other_settings(shape, slices, fields):
    torch.manual_seed(0)
    check(torch.randn(shape), slices, **fields)


def test_either_form_loads_the_others_checkpoint():
    reference, fast = supernet_pair()
    images = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    weights = mixture(reference.space)
    reference(images, weights)
    fast(images + 1, weights)
    other_reference, other_fast = supernet_pair()
    other_reference.load_state_dict(fast.state_dict())
    other_fast.load_state_dict(reference.state_dict())
    for ours, theirs in ((other_reference, fast), (other_fast, reference)):
        expected = theirs.eval()(images, weights)
        torch.testing.assert_close(ours.eval()(images, weights), expected, rtol=1e-10, atol=1e-10)
    incomplete = {name: v for name, v in reference.state_dict().items() if ".edges.0.operations.4." not in name}
    with pytest.raises(RuntimeError, match=r"edges\.0\.operations\.4"):
        fast.load_state_dict(incomplete)


def test_an_operation_of_the_users_own_runs_edge_by_edge(monkeypatch):
    monkeypatch.setattr("dnas_ens.nn.operations._REGISTRY", dict(_REGISTRY))

    @register_operation("scaled_conv")
    def scaled_conv(in_channels, out_channels, stride, affine):
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.BatchNorm2d(out_channels, affine=affine)
        )

    check(torch.randn(4, 2, 8, 8), 2, operations=("skip_connect", "scaled_conv", "sep_conv_3x3"))


def test_search_steps_have_the_same_losses(few_digits):
    def losses(form):
        fields = {"num_nodes": 2, "channels": 2, "epochs": 3, "warmup_epochs": 1, "learning_rate": 0.01}
        config = with_fields(SearchConfig(), space="darts", form=form, batch_size=12, **fields)
        loop = SearchLoop(config, few_digits)
        # In double precision, for training multiplies rounding; both forms round differently.
        loop.supernet.double()
        images = loop.steps.member_logits
        loop.steps.member_logits = lambda batch, mixtures, **how: images(batch.double(), mixtures.double(), **how)
        loop.measure = dict
        return [loop.run_epoch() for _ in range(config.bilevel.epochs)]

    fast, reference = losses("fast"), losses("reference")
    assert reference[0]["train_loss"] != reference[-1]["train_loss"]
    for ours, theirs in zip(fast, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
