import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from tiny import distributions, genotype, logits

from dnas_ens.errors import UserError
from dnas_ens.search.relaxation import (
    add_auxiliary_skip,
    discretise,
    edge_probs,
    genotype_logits,
    genotype_mixture,
    gumbel_mixture,
    mixture_distribution,
    normalised_entropy,
)
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import SPACES

SPACE = SearchSpace(num_nodes=2, operations=("none", "skip_connect", "sep_conv_3x3"))
CELL = [[["skip_connect", 0], ["sep_conv_3x3", 1]], [["sep_conv_3x3", 0], ["sep_conv_3x3", 2]]]
GENOTYPE = Genotype.from_dict({"normal": CELL, "reduction": CELL})


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_distribution_against_scipy(temperature):
    alpha, beta = logits(SPACE)
    mixture = mixture_distribution(alpha, beta, SPACE, temperature=temperature).numpy()
    for cell_type in range(2):
        for node in (slice(0, 2), slice(2, 5)):
            edges = softmax(beta[cell_type, node].numpy() / temperature)
            operations = softmax(alpha[cell_type, node].numpy() / temperature, axis=-1)
            np.testing.assert_allclose(mixture[cell_type, node], edges[:, None] * operations, rtol=1e-12)
            assert mixture[cell_type, node].sum() == pytest.approx(1.0)


def test_gumbel_samples_are_seeded_distributed_like_the_softmax_and_sharpen():
    alpha, beta = logits(SPACE)

    def sample(temperature, count=20_000, seed=0):
        lead = (part.expand(count, *part.shape) for part in (alpha, beta))
        generator = torch.Generator().manual_seed(seed)
        return gumbel_mixture(*lead, SPACE, temperature=temperature, generator=generator)

    many = sample(0.5)
    assert float((many.sum(-1) - edge_probs(beta, SPACE)).abs().max()) < 1e-12
    frequency = torch.nn.functional.one_hot(many.argmax(-1), 3).double().mean(0)
    assert float((frequency - alpha.softmax(-1)).abs().max()) < 0.015
    assert torch.equal(sample(1.0, 1), sample(1.0, 1))
    assert not torch.equal(sample(1.0, 1), sample(1.0, 1, seed=2))
    sharp = sample(0.001, 1) / edge_probs(beta, SPACE).unsqueeze(-1)
    assert float(sharp.max(-1).values.min()) > 0.99


def test_auxiliary_skip_adds_to_skip_alone():
    mixture = distributions(SPACE)
    added = add_auxiliary_skip(mixture, SPACE, weight=0.5) - mixture
    assert float(added[..., [0, 2]].abs().max()) == 0.0
    torch.testing.assert_close(added[..., 1], 0.5 * mixture.sum(-1))
    without = SearchSpace(num_nodes=2, operations=("sep_conv_3x3",))
    with pytest.raises(UserError, match="needs the operation skip_connect"):
        add_auxiliary_skip(mixture[..., 2:], without, weight=0.5)


@pytest.mark.parametrize("space", SPACES)
def test_the_smoothed_one_hot_of_a_genotype_is_discretised_to_it(space):
    whole = SearchSpace.for_stack(3, name=space)
    for seed in range(20):
        cells = genotype(seed, space=space, num_nodes=whole.num_nodes, cell_types=whole.cell_types)
        smoothed = genotype_logits(genotype_mixture(cells, whole), whole, smoothing=0.1)
        # Of the edges of a node, those of the lesser source come first.
        assert discretise(mixture_distribution(*smoothed, whole), whole) == cells


def test_a_node_of_the_efficient_space_keeps_the_number_of_edges_that_is_nearest():
    space = SearchSpace(name="efficient", num_nodes=2, operations=("none", "conv_3x3", "skip_connect"))
    for seed in range(50):
        mixture = distributions(space, seed=seed, scale=2.0)
        cells = discretise(mixture, space)
        for cell, weights in zip((cells.normal, cells.reduction), mixture, strict=True):
            assert len(cell[0]) == 1
            node = weights[space.node_slices[1]].numpy()
            best = 1 + node[:, 1:].argmax(-1)
            # The node before it always comes first, whatever its strength.
            order = np.array([1, 0])
            apart = []
            for count in (1, 2):
                kept = np.zeros_like(node)
                kept[order[:count], best[order[:count]]] = 1 / count
                apart.append(jensenshannon(node.ravel(), kept.ravel()))
            assert len(cell[1]) == 1 + int(np.argmin(apart))
            assert (space.operations[best[order[0]]], int(order[0])) in cell[1]
    counts = {len(discretise(distributions(space, seed=seed, scale=2.0), space).normal[1]) for seed in range(50)}
    assert counts == {1, 2}
    assert len(discretise(mixture, space, edges_per_node=1).normal[1]) == 1


def test_logits_of_a_genotype_are_its_smoothed_one_hot():
    alpha, beta = genotype_logits(genotype_mixture(GENOTYPE, SPACE), SPACE, smoothing=0.1)
    distribution = mixture_distribution(alpha, beta, SPACE)
    # Node 1 keeps sources 0 and 2 of its three: 0.9 / 2 + 0.1 / 3 each; operation 0.9 + 0.1 / 3.
    kept = (0.45 + 0.1 / 3) * (0.9 + 0.1 / 3)
    assert float(distribution[0, 2, 2]) == pytest.approx(kept, abs=1e-6)
    assert float(distribution[0, 3].sum()) == pytest.approx(0.1 / 3, abs=1e-6)
    assert discretise(distribution, SPACE) == GENOTYPE


def test_discretise_takes_the_strongest_edges_and_never_none():
    mixture = torch.zeros(SPACE.shape)
    mixture[:, 0, 0], mixture[:, 0, 1] = 0.9, 0.02  # mostly none, else skip
    mixture[:, 1, 2] = 0.08
    mixture[:, 2, 2], mixture[:, 3, 1], mixture[:, 4, 1] = 0.2, 0.5, 0.3
    two = discretise(mixture, SPACE)
    assert two.normal == (
        (("skip_connect", 0), ("sep_conv_3x3", 1)),
        (("skip_connect", 1), ("skip_connect", 2)),
    )
    assert normalised_entropy((mixture > 0.4).float(), SPACE) == 0.0
    assert 0.3 < normalised_entropy(mixture, SPACE) < 0.8
    one = discretise(mixture, SPACE, edges_per_node=1)
    assert one.reduction == ((("sep_conv_3x3", 1),), (("skip_connect", 1),))


def test_a_base_outside_the_space_is_refused():
    with pytest.raises(UserError, match="not searched"):
        genotype_mixture(GENOTYPE, SearchSpace(num_nodes=2, operations=("skip_connect",)))
    with pytest.raises(UserError, match="has 2 nodes; the search has 3"):
        genotype_mixture(GENOTYPE, SearchSpace(num_nodes=3))
    with pytest.raises(UserError, match="of the space darts; the search is in efficient"):
        genotype_mixture(GENOTYPE, SearchSpace(name="efficient", num_nodes=2))
