import pytest
import torch
from hypothesis import HealthCheck, settings

from dnas_ens.config import SearchConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.data import ImageData, Split, load_data

# No test is timed: the machine may be busy with other things.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    # Tiny tensors: a second thread would only wait for the first.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


@pytest.fixture(scope="session")
def few_digits(digits):
    """Digits with 96 training, 40 validation and 40 test images: enough to run everything on."""

    def some(split, count):
        return Split(images=split.images[:count], labels=split.labels[:count])

    return ImageData.from_splits(
        "few digits",
        digits.classes,
        train=some(digits.train, 96),
        val=some(digits.val, 40),
        test=some(digits.test, 40),
        flip=False,
    )


@pytest.fixture
def tiny_search():
    """A search of seconds: one cell, two nodes, two channels, three epochs."""
    return with_fields(
        SearchConfig(),
        num_cells=1,
        channels=2,
        num_nodes=2,
        directions=3,
        epochs=3,
        warmup_epochs=1,
        batch_size=24,
        drawn_members=2,
        members=3,
        pool_size=9,
        architecture_learning_rate=0.1,
    )
