import pytest
import torch

from dnas_ens.nn.fast_supernet import FastSupernet
from dnas_ens.nn.supernet import Supernet
from dnas_ens.search_space import DARTS_OPERATIONS, SearchSpace

WITH_NONE = ("none", *DARTS_OPERATIONS)


def pair(*, operations=WITH_NONE, num_cells=3, num_nodes=3, channels=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    space = SearchSpace.for_stack(num_cells, operations=operations, num_nodes=num_nodes)
    reference = Supernet(space, num_cells=num_cells, channels=channels, in_channels=2, num_classes=5).to(
        dtype
    )
    return reference, FastSupernet.from_reference(reference)


def mixtures(space, slices, dtype):
    shape = space.shape if slices is None else (slices, *space.shape)
    return torch.rand(shape, dtype=dtype).div_(len(space.operations)).requires_grad_()


def assert_equal_steps(reference, fast, images, mixture, *, tolerance):
    labels = torch.arange(len(images)) % 5
    results = {}
    for name, net in (("reference", reference), ("fast", fast)):
        own = mixture.detach().clone().requires_grad_()
        logits = net(images, own)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        # Gradients under the reference's names, through the same mapping as the weights.
        gradients = FastSupernet.from_reference(reference) if name == "fast" else None
        if gradients is not None:
            for target, source in zip(gradients.parameters(), net.parameters(), strict=True):
                target.data.copy_(source.grad)
            names = dict(reference.named_parameters())
            weights = {key: value for key, value in gradients.state_dict().items() if key in names}
        else:
            weights = {key: value.grad for key, value in net.named_parameters()}
        results[name] = {"logits": logits.detach(), "mixture": own.grad} | weights
        results[name] |= {
            f"buffer {key}": value
            for key, value in net.state_dict().items()
            if key.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")
        }
    expected, found = results["reference"], results["fast"]
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        difference = float((found[key].double() - value.double()).abs().max())
        assert difference <= tolerance * scale, (key, difference, scale)


@pytest.mark.parametrize(
    "operations", [WITH_NONE, DARTS_OPERATIONS, ("max_pool_3x3",), ("skip_connect", "dil_conv_5x5")]
)
@pytest.mark.parametrize("slices", [None, 1, 3])
def test_fast_supernet_equals_reference_in_double_precision(operations, slices):
    reference, fast = pair(operations=operations)
    images = torch.randn(6, 2, 9, 9, dtype=torch.float64)
    assert_equal_steps(
        reference, fast, images, mixtures(reference.space, slices, torch.float64), tolerance=1e-10
    )
