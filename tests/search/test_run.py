import pytest
import torch

from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.evaluate.predictions import predict_splits
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.run import estimate, run_search
from dnas_ens.training.members import train_members


@pytest.mark.parametrize(
    "fields",
    [{"channels": 4}, {"num_cells": 5, "channels": 16}, {"channels": 4, "form": "reference"}],
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


def test_what_a_notebook_shows_is_short(few_digits, tiny_search):
    found = run_search(tiny_search, few_digits)
    heading, *members = repr(found).splitlines()
    assert heading == f"SearchResult: 3 members of {len(found.candidates)} candidates, regime star"
    for line, index in zip(members, found.selected, strict=True):
        nll = found.candidates[index].supernet_val_nll
        assert f"candidate {index}, lambda {found.candidates[index].lam:.3f}, direction " in line
        assert line.endswith(f"inherited weights {nll:.3f}")
    shown = found._repr_html_()
    assert shown.count("<tr>") == 4
    assert f"<td>{found.candidates[found.selected[2]].supernet_val_nll:.3f}</td></tr>" in shown
    assert "data:image/svg+xml;base64," in shown
    ensemble = train_members(found.genotypes, few_digits, RetrainConfig(num_cells=1, channels=2, epochs=1))
    predictions = predict_splits(ensemble, few_digits)
    assert repr(predictions) == "Predictions(3 members, 40 val and 40 test images, 10 classes)"
