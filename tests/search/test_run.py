import pytest
import torch

from dnas_ens.config import SearchConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.run import estimate


@pytest.mark.parametrize(
    "fields",
    [{"num_cells": 5, "channels": 16}, {"channels": 4, "form": "reference"}],
    ids=str,
)
def test_memory_estimate_against_what_autograd_keeps(digits, fields):
    config = with_fields(SearchConfig(), **fields)
    loop = SearchLoop(config, digits)
    kept = {}

    def note(tensor):
        # The tensor itself is held, so that its storage is not counted for another.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(config.bilevel.batch_size, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    mixtures = loop.family.start()[None].repeat(4, 1, 1, 1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = loop.supernet(images, mixtures)
    assert logits.requires_grad
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20
    estimated = estimate(config, digits)
    assert measured <= estimated["memory_mib"] <= 1.6 * measured
    assert estimated["supernet_parameters"] == sum(p.numel() for p in loop.supernet.parameters())
    assert estimated["weight_steps"] == 20 * (len(loop.weight_half) // 64)
