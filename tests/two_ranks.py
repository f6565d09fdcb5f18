"""What one process and two of torchrun compute alike.

    torchrun --standalone --nproc-per-node 2 tests/two_ranks.py FOLDER

Each rank writes FOLDER/RANK.json, what it computed by the name of its case, and rank 0 a state of a search.
"""

import sys
from pathlib import Path

import torch
from tiny import genotype
from torch import nn

from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.data import load_data
from dnas_ens.errors import UserError
from dnas_ens.nn.moments import PointwiseNorm
from dnas_ens.nn.synchronised import separate, synchronise
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import write_json
from dnas_ens.run.ranks import current, end, joined
from dnas_ens.search.loop import SearchLoop
from dnas_ens.training.members import train_member
from dnas_ens.training.trainer import MemberTraining

SEARCH = with_fields(
    SearchConfig(),
    num_cells=2,
    channels=4,
    num_nodes=2,
    directions=3,
    epochs=2,
    warmup_epochs=0,
    batch_size=24,
    drawn_members=2,
    penalty_draws=4,
    architecture_learning_rate=0.1,
    relaxation="softmax",
)
DARTS = {"space": "darts", "operations": ("none", "skip_connect", "sep_conv_3x3", "dil_conv_3x3", "max_pool_3x3")}
SEARCHES = {
    "efficient": {},
    "fast form": {**DARTS, "num_cells": 3},
    "hard paths": {"relaxation": "gumbel-hard"},
    "second order": {"relaxation": "gumbel-softmax", "second_order": True},
    "predictions compared": {"penalty": "js-pairwise+js-predictive", "likelihood": "ensemble"},
    "separate passes": {"passes": "separate"},
}
MEMBERS = {
    "plain": {},
    "regularised": {"drop_path": 0.3, "cutout": 3, "auxiliary_weight": 0.4, "label_smoothing": 0.1},
    "weighted": {"balance": "weights"},
}


def flat(module):
    return [float(value) for tensor in module.parameters() for value in tensor.detach().flatten()]


def digits():
    return load_data("digits", limit_train=96)


def searched(loop, epochs):
    scalars = [loop.run_epoch() for _ in range(epochs)]
    loop.require_agreement()
    return {"scalars": scalars, "hypernetwork": flat(loop.family.hypernetwork), "weights": flat(loop.supernet)}


def search(data, fields):
    """An epoch in double precision: distances of predictions that are nearly equal are mostly rounding in single."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        loop = SearchLoop(with_fields(SEARCH, **fields), data)
        loop.supernet.double()
        slices = loop._whole_slices
        loop._whole_slices = lambda images, labels: slices(images.double(), labels)
        # The validation images are in single precision.
        loop.measure = dict
        return searched(loop, 1)
    finally:
        torch.set_default_dtype(before)


def member(data, fields):
    recipe = with_fields(RetrainConfig(), num_cells=3, channels=4, epochs=4, batch_size=24, weight_decay=3e-4, **fields)
    cells = genotype(0, space="efficient", cell_types=("normal", "reduction"))
    network, described = train_member(MemberTraining(cells, data, recipe, index=0))
    norms = [float(value) for buffer in network.buffers() for value in buffer.flatten()]
    return {"weights": flat(network), "norms": norms, "loss": described["train_loss"], "val_nll": described["val_nll"]}


def norms(_):
    """Outputs, gradients and running statistics of both kinds of norm, of this rank's share of 8 images."""
    found = {}
    for name, norm in {"plain": nn.BatchNorm2d(6), "pointwise": PointwiseNorm(2, 3)}.items():
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(8, 6, 3, 3, generator=generator, dtype=torch.float64) + 1
        target = torch.randn(8, 6, 3, 3, generator=generator, dtype=torch.float64)
        norm.double()
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        synchronise(norm)
        own = current().own(8)
        images.requires_grad_()
        shares = images[own].contiguous(memory_format=torch.channels_last)
        if name == "plain":
            outputs = norm(shares)
        else:
            matrices, shift = norm.matrices(shares)
            grouped = shares.unflatten(1, (2, 3))
            outputs = (torch.einsum("gdc,bgchw->bgdhw", matrices, grouped) + shift[..., None, None]).flatten(1, 2)
        (outputs - target[own]).square().mean().backward()
        current().average_gradients([*norm.parameters(), images])
        separate(norm)
        found[name] = {
            "outputs": outputs.tolist(),
            "gradients": [parameter.grad.tolist() for parameter in [*norm.parameters(), images]],
            "statistics": [buffer.tolist() for buffer in norm.buffers()],
            "class": type(norm).__name__,
        }
    return found


def apart(data):
    """What is told where a rank's hypernetwork was changed by hand."""
    loop = SearchLoop(SEARCH, data)
    loop.run_epoch()
    with torch.no_grad():
        next(loop.family.hypernetwork.parameters()).flatten()[0] += 1e-6 * current().rank
    try:
        loop.require_agreement()
    except UserError as error:
        return error.cause
    return None


def local(data):
    """The running statistics of two ranks that keep their own in an epoch, before and after they agree."""
    loop = SearchLoop(SEARCH, data)
    loop.run_epoch()
    first = next(loop.supernet.buffers()).tolist()
    loop.require_agreement()
    return {"before": first, "after": next(loop.supernet.buffers()).tolist()}


def together(folder):
    data = digits()
    found = {
        "searches": {name: search(data, fields) for name, fields in SEARCHES.items()},
        "members": {name: member(data, fields) for name, fields in MEMBERS.items()},
        "norms": norms(data),
        "apart": apart(data),
    }
    # The state of a search of which one process has done an epoch, and what comes of it here.
    loop = SearchLoop(with_fields(SEARCH, epochs=3), data)
    loop.load_state_dict(current().shared_state(CheckpointStore(folder, name="one").load_newest()[1]))
    found["gone on"] = searched(loop, 1)
    if current().first:
        CheckpointStore(folder, name="two").save(1, loop.state_dict())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER = Path(sys.argv[1])
    with joined("cpu", sync_batch_norm=True) as RANKS:
        FOUND = together(FOLDER)
        RANKS.sync_batch_norm = False
        FOUND["local"] = local(digits())
        write_json(FOLDER / f"{RANKS.rank}.json", FOUND)
    end(0)
