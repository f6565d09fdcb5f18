import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.config import SearchConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.search.family import ArchitectureFamily
from dnas_ens.search.hypernetwork import MlpHypernetwork, PiecewiseLinearHypernetwork
from dnas_ens.space.search_space import SearchSpace

SPACE = SearchSpace(num_nodes=2)


def paths(num_knots=5, seed=0):
    size = {"num_directions": 3, "num_knots": num_knots, "max_lambda": 0.8}
    net = PiecewiseLinearHypernetwork(SPACE, **size, train_positions=False).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (net.base, net.steps, net.gap_logits):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net


def mlp():
    return MlpHypernetwork(SPACE, num_directions=3, max_lambda=0.8, generator=torch.Generator().manual_seed(0)).double()


def at(net, lam, direction):
    alpha, beta = net(torch.tensor([lam], dtype=torch.float64), torch.tensor([direction]))
    return torch.cat([alpha.flatten(), beta.flatten()])


@settings(max_examples=25)
@given(st.integers(2, 7), st.integers(0, 1000))
def test_path_is_exact_at_its_knots_and_linear_between_them(num_knots, seed):
    net = paths(num_knots=num_knots, seed=seed)
    positions = net.positions()
    assert [float(positions[0]), float(positions[-1])] == [0.0, 0.8]
    assert bool((positions.diff() > 0).all())
    for direction in range(3):
        knots = [net.base]
        for step in net.steps[direction]:
            knots.append(knots[-1] + step)
        knots = [torch.cat([knot[..., :-1].flatten(), knot[..., -1].flatten()]) for knot in knots]
        for position, knot in zip(positions.tolist(), knots, strict=True):
            torch.testing.assert_close(at(net, position, direction), knot)
        for k in range(num_knots - 1):
            quarter = float(0.75 * positions[k] + 0.25 * positions[k + 1])
            torch.testing.assert_close(at(net, quarter, direction), 0.75 * knots[k] + 0.25 * knots[k + 1])


@pytest.mark.parametrize("build", [paths, mlp])
def test_all_directions_part_from_the_base(build):
    net = build()
    base = torch.cat([part.flatten() for part in net.base_logits()])
    for direction in range(3):
        torch.testing.assert_close(at(net, 0.0, direction), base)
    ends = torch.stack([at(net, 0.8, direction) for direction in range(3)])
    assert float(torch.pdist(ends.detach()).min()) > 0
    assert torch.equal(at(net, -0.3, 1), at(net, 0.0, 1))
    assert torch.equal(at(net, 5.0, 1), at(net, 0.8, 1))
    # A detached base gets no gradient, but the paths do.
    alpha, _ = net(torch.tensor([0.4], dtype=torch.float64), torch.tensor([0]), detach_base=True)
    alpha.square().sum().backward()
    assert net.base.grad is None
    others = [p.grad for name, p in net.named_parameters() if name != "base" and p.grad is not None]
    assert sum(float(gradient.abs().sum()) for gradient in others) > 0


def family(**fields):
    return ArchitectureFamily(with_fields(SearchConfig(), **fields))


def test_draws_are_stratified_clipped_and_without_replacement():
    points = family(directions=5, max_lambda=0.8, lambda_margin=0.1)
    generator, lams = torch.Generator().manual_seed(0), []
    for _ in range(500):
        draw = points.draw(4, generator)
        assert len(set(draw.direction.tolist())) == 4
        ordered = draw.lam.sort().values
        # One draw a stratum of [-0.1, 0.9], clipped to the range.
        for stratum, value in enumerate(ordered.tolist()):
            assert max(0.0, stratum * 0.25 - 0.1) <= value <= min(0.8, (stratum + 1) * 0.25 - 0.1) + 1e-6
        lams.append(draw.lam)
    everything = torch.stack(lams)
    assert 0.05 < float((everything == 0).float().mean()) < 0.15  # a tenth of the interval lies below 0
    assert 0.05 < float((everything == 0.8).float().mean()) < 0.15
    # Shuffled: no slice of the batch sees small lambdas only.
    assert float(everything.mean(0).std()) < 0.05
    # More members than directions share them evenly.
    assert family(directions=2).draw(5, generator).direction.tolist().count(0) in (2, 3)
    assert family(directions=1, fixed_lambda=0.25).draw(3, generator).lam.tolist() == [0.25] * 3
