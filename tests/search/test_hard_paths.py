import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from tiny import genotype, logits

from dnas_ens.config.fields import with_fields
from dnas_ens.search.hard_paths import hard_paths
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.objective import edge_overlap_penalty
from dnas_ens.search.relaxation import discretise, genotype_mixture, gumbel_noise
from dnas_ens.space.search_space import SearchSpace

SPACE = SearchSpace(num_nodes=2, operations=("none", "skip_connect", "sep_conv_3x3"))


def drawn(count, *, edges_per_node=2, temperature=0.5):
    """Many paths of one architecture, its logits, and the noise that they were drawn with."""
    alpha, beta = (part.expand(count, *part.shape).clone().requires_grad_() for part in logits(SPACE))
    paths = hard_paths(
        alpha,
        beta,
        SPACE,
        temperature=temperature,
        edges_per_node=edges_per_node,
        generator=torch.Generator().manual_seed(0),
    )
    return paths, alpha, beta, gumbel_noise(alpha, torch.Generator().manual_seed(0)).numpy()


@pytest.mark.parametrize("edges_per_node", [1, 2, 3])
def test_each_node_draws_its_edges_once_and_never_none(edges_per_node):
    paths = drawn(500, edges_per_node=edges_per_node)[0].detach()
    assert set(paths.unique().tolist()) == {0.0, 1.0}
    assert not paths[..., 0].any()
    assert float(paths.sum(-1).max()) == 1.0
    for node in SPACE.node_slices:
        assert set(paths[:, :, node].sum((-2, -1)).unique().tolist()) == {min(edges_per_node, node.stop - node.start)}


def test_where_nodes_may_keep_fewer_edges_a_path_keeps_what_its_sample_is_nearest_to():
    space = SearchSpace(name="efficient", num_nodes=3, operations=("none", "skip_connect", "conv_3x3"))
    alpha, beta = (part.requires_grad_() for part in logits(space, 200))
    generator = torch.Generator().manual_seed(0)
    paths = hard_paths(alpha, beta, space, temperature=0.5, edges_per_node=2, generator=generator)
    counts = torch.stack([paths[..., node, :].sum((-2, -1)) for node in space.node_slices], dim=-1)
    assert set(counts[..., 0].unique().tolist()) == {1.0}
    assert set(counts[..., 1:].unique().tolist()) == {1.0, 2.0}
    # The gradient of a node's sum is zero whatever k: that of k times a softmax.
    gradients = torch.autograd.grad(paths.sum(), (alpha, beta))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-12
    found = discretise(paths[0].detach(), space, edges_per_node=2)
    assert torch.equal(genotype_mixture(found, space).double(), paths[0].detach())


def test_pairs_are_drawn_as_the_natural_distribution_says():
    count = 20_000
    paths, alpha, beta, _ = drawn(count, edges_per_node=1)
    for cell_type in range(2):
        for node in SPACE.node_slices:
            edges = softmax(beta[0, cell_type, node].detach().numpy())
            probs = edges[:, None] * softmax(alpha[0, cell_type, node].detach().numpy(), axis=-1)
            probs[:, 0] = 0
            frequency = paths[:, cell_type, node].detach().mean(0).numpy()
            np.testing.assert_allclose(frequency, probs / probs.sum(), atol=4 * np.sqrt(0.25 / count))


def test_the_gradient_is_that_of_the_relaxed_sample():
    temperature, edges_per_node = 0.5, 2
    paths, alpha, beta, noise = drawn(1, edges_per_node=edges_per_node, temperature=temperature)
    weights = torch.randn(paths.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (paths * weights).sum().backward()

    def relaxed_sum(alpha, beta):
        total = 0.0
        for cell_type in range(2):
            for node in SPACE.node_slices:
                scores = log_softmax(beta[cell_type, node])[:, None] + log_softmax(alpha[cell_type, node], axis=-1)
                scores = (scores + noise[0, cell_type, node])[:, 1:]
                soft = softmax(scores / temperature) * min(edges_per_node, node.stop - node.start)
                total += (soft * weights[0, cell_type, node, 1:].numpy()).sum()
        return total

    given = alpha[0].detach().numpy(), beta[0].detach().numpy()
    for which, gradient in enumerate((alpha.grad[0].numpy(), beta.grad[0].numpy())):
        for place in np.ndindex(gradient.shape):
            sides = []
            for sign in (1, -1):
                moved = [part.copy() for part in given]
                moved[which][place] += sign * 1e-6
                sides.append(relaxed_sum(*moved))
            assert gradient[place] == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-8)


def test_a_step_trains_weights_and_paths_on_all_training_images(few_digits, tiny_search):
    config = with_fields(tiny_search, relaxation="gumbel-hard", drawn_members=None, epochs=2, warmup_epochs=0)
    loop = SearchLoop(config, few_digits)
    assert type(loop.supernet).__name__ == "Supernet"
    assert len(loop.weight_images) == 96
    passes, seen = [], []
    loop.supernet.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    loop.run_epoch(seen.append)
    assert seen == [24] * 4
    assert passes[:4] == [24] * 4  # a step is one pass
    operations = [parameter for name, parameter in loop.supernet.named_parameters() if ".operations." in name]
    loop.steps.begin_epoch(loop.schedules)
    batch = next(iter(loop._batch_pairs()))[0]
    before = [parameter.detach().clone() for parameter in operations]
    base = loop.family.hypernetwork.base.detach().clone()
    loop.steps.joint_step(batch)
    moved = [not torch.equal(*pair) for pair in zip(operations, before, strict=True)]
    assert 0 < sum(moved) < len(moved)
    assert moved == [parameter.grad is not None for parameter in operations]
    assert not torch.equal(loop.family.hypernetwork.base, base)


def test_penalties_read_the_natural_distributions(few_digits, tiny_search):
    config = with_fields(
        tiny_search,
        relaxation="gumbel-hard",
        penalty="edge-overlap",
        base="given.json",
        commitment=(0.0, 0.0),
        operation_balance=(0.0, 0.0),
        penalty_weight=(3.0, 3.0),
    )
    loop = SearchLoop(config, few_digits, base=genotype(space="efficient"))
    points = loop.family.grid(torch.tensor([0.2, 0.8]))
    natural, edges = loop.family.distributions(points), loop.family.given_edges
    expected = 3 * edge_overlap_penalty(natural, edges, points.lam, loop.family.space)
    torch.testing.assert_close(loop.steps._penalised(torch.zeros(()), points), expected)
