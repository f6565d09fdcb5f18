import numpy as np
import pytest
import torch
from torch import nn

from dnas_ens.ensembles import Ensemble
from dnas_ens.ensembles.cascade import Cascade, cascaded, fit_cascade
from dnas_ens.errors import UserError


def voters(generator, *, members=5, images=4000, classes=5):
    """Members that see the right class through noise of their own: one alone is worse than their average."""
    labels = generator.integers(classes, size=images)
    signal = 2.0 * np.eye(classes)[labels] + 1.3 * generator.normal(size=(images, classes))
    logits = signal + 1.3 * generator.normal(size=(members, images, classes))
    probs = np.exp(logits)
    return probs / probs.sum(axis=2, keepdims=True), labels


def by_hand(probs, weights, threshold):
    """Ask image by image."""
    asked, labels = [], []
    for image in range(probs.shape[1]):
        for count in range(1, len(probs) + 1):
            averaged = np.average(probs[:count, image], axis=0, weights=weights[:count])
            if averaged.max() >= threshold:
                break
        asked.append(count)
        labels.append(averaged.argmax())
    return np.array(asked), np.array(labels)


def test_a_cascade_stops_as_one_asks_by_hand():
    probs, _ = voters(np.random.default_rng(0), images=200)
    weights = np.array([0.4, 0.1, 0.2, 0.2, 0.1])
    for threshold in (0.3, 0.8, 0.99):
        averaged, asked = cascaded(probs, weights, threshold)
        expected, labels = by_hand(probs, weights, threshold)
        assert (asked.tolist(), averaged.argmax(axis=1).tolist()) == (expected.tolist(), labels.tolist())
    averaged, asked = cascaded(probs, weights, 2.0)
    assert (asked == 5).all()
    np.testing.assert_allclose(averaged, np.average(probs, axis=0, weights=weights))


@pytest.mark.parametrize("accuracy_loss", [0.0, 0.01])
def test_a_fitted_cascade_is_as_accurate_on_fresh_images_for_less(accuracy_loss):
    generator = np.random.default_rng(1)
    probs, labels = voters(generator)
    cascade = fit_cascade(probs[:, :2000], labels[:2000], accuracy_loss=accuracy_loss)
    weights = np.full(5, 0.2)
    asked, found = by_hand(probs[:, :2000], weights, cascade.threshold)
    assert asked.mean() == pytest.approx(cascade.mean_members)
    full = probs.mean(axis=0).argmax(axis=1) == labels
    assert (found == labels[:2000]).mean() >= full[:2000].mean() - accuracy_loss - 1e-12
    asked, found = by_hand(probs[:, 2000:], weights, cascade.threshold)
    assert asked.mean() < 4.5
    # Within three standard errors of what it may lose.
    lost = full[2000:].astype(float) - (found == labels[2000:])
    assert lost.mean() <= accuracy_loss + 3 * lost.std() / 2000**0.5


def test_a_single_member_and_members_that_never_agree():
    probs, labels = voters(np.random.default_rng(2), members=1, images=100)
    assert fit_cascade(probs, labels).mean_members == 1.0
    with pytest.raises(UserError, match="accuracy to lose is 1"):
        fit_cascade(probs, labels, accuracy_loss=1.0)


class Fixed(nn.Module):
    """Gives stored log-probabilities for images that hold their index, and counts what it was asked."""

    def __init__(self, probs):
        super().__init__()
        self.register_buffer("log_probs", torch.from_numpy(probs).log().float())
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return self.log_probs[images[:, 0, 0, 0].long()]


# Fitted weights may leave the first member out, which is asked all the same and decides nothing.
@pytest.mark.parametrize("weights", [[0.4, 0.1, 0.2, 0.2, 0.1], [0.0, 0.5, 0.2, 0.2, 0.1]])
def test_the_ensemble_asks_no_more_than_the_cascade_says(weights):
    probs, labels = voters(np.random.default_rng(3), images=300)
    members = [Fixed(each) for each in probs]
    ensemble = Ensemble(members, weights=weights, outputs="logits")
    cascade = fit_cascade(probs, labels, weights=weights, accuracy_loss=0.02)
    images = torch.arange(300.0).view(-1, 1, 1, 1)
    found, asked = ensemble.cascade_probs(images, cascade, batch_size=64)
    assert asked.tolist() == cascaded(probs, np.array(weights), cascade.threshold)[1].tolist()
    assert [member.seen for member in members] == [int((asked > index).sum()) for index in range(5)]
    assert 1 < asked.mean() == pytest.approx(cascade.mean_members)
    for index in range(5):
        np.testing.assert_allclose(found[index, asked > index], probs[index, asked > index], rtol=1e-5)
        assert np.isnan(found[index, asked <= index]).all()
    averaged, counts = ensemble.averaged(probs, cascade)
    assert counts.tolist() == asked.tolist()
    for image in range(0, 300, 7):
        some = asked[image]
        expected = np.average(probs[:some, image], axis=0, weights=weights[:some])
        np.testing.assert_allclose(averaged[image], expected)


def test_a_broken_member_is_named_and_not_taken_for_one_that_was_not_asked():
    probs, _ = voters(np.random.default_rng(4), members=2, images=20)
    members = [Fixed(each) for each in probs]
    members[1].log_probs[7] = float("nan")
    ensemble = Ensemble(members, outputs="logits")
    images = torch.arange(20.0).view(-1, 1, 1, 1)
    with pytest.raises(UserError, match="Member 1 predicts probabilities that are not finite"):
        ensemble.cascade_probs(images, Cascade(threshold=2.0, mean_members=2.0))
