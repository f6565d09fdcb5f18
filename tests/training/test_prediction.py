"""What classifiers return, what batches are, and BatchNorm statistics, against NumPy in double precision."""

from __future__ import annotations

import dataclasses
import itertools
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dnas_ens.ensembles.averaging import PolyakAverage, averaged_model, recompute_batch_norm
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.evolution import EvolutionSettings, evolve_simplex
from dnas_ens.ensembles.soups import evaluate_on_val, greedy_soup
from dnas_ens.errors import UserError
from dnas_ens.training.prediction import (
    INPUT_KEYS,
    LABEL_KEYS,
    as_pair,
    predict_batches,
    predict_members,
)

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(20, 3, 4, 4, generator=GENERATOR)
LABELS = torch.arange(20) % 3
#: The last batch is smaller.
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


def classifier(*last: nn.Module, num_classes: int = 3, scale: float = 20.0) -> nn.Sequential:
    """A linear classifier of confident predictions, with something behind it."""
    torch.manual_seed(1)
    linear = nn.Linear(48, num_classes)
    linear.weight.data.mul_(scale)
    return nn.Sequential(nn.Flatten(), linear, *last).eval()


def numpy_softmax(model: nn.Sequential, images: Tensor = IMAGES) -> np.ndarray:
    """Probabilities by the linear layer alone."""
    weight, bias = (part.detach().double().numpy() for part in (model[1].weight, model[1].bias))
    logits = images.double().flatten(1).numpy() @ weight.T + bias
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


class Returning(nn.Module):
    """Anything made from the logits of a classifier."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.make = classifier(), make

    def forward(self, images: Tensor) -> Any:
        return self.make(self.network(images))


class TestProbabilities:
    """Probabilities are not soft-maxed again, and logits are."""

    @pytest.mark.parametrize("images", [IMAGES, IMAGES[:1]], ids=["many", "one"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_a_softmax_of_the_members_own_is_the_only_one(self, dtype: torch.dtype, images: Tensor) -> None:
        # Few confident predictions: their sum is the farther from 1 the more classes share it.
        member = classifier(nn.Softmax(1), num_classes=10, scale=1.0).to(dtype)
        expected = numpy_softmax(classifier(num_classes=10, scale=1.0), images)
        ensemble = Ensemble([member])
        with pytest.warns(UserWarning, match="Member 0 returns class probabilities") as told:
            probs = ensemble.predict_probs(images)[0]
        assert len(told) == 1
        again = ensemble.predict_probs(images)[0]
        np.testing.assert_allclose(probs, expected, atol=4 * torch.finfo(dtype).eps + 1e-6)
        np.testing.assert_allclose(probs.sum(axis=1), 1.0, atol=1e-6)
        np.testing.assert_array_equal(probs, again)
        assert ensemble.outputs == ["probs"]

    @pytest.mark.parametrize("last", [(), (nn.LogSoftmax(1),)], ids=["logits", "log-probabilities"])
    @pytest.mark.parametrize("outputs", [None, "logits"])
    def test_logits_and_log_probabilities(self, last: tuple[nn.Module, ...], outputs: Any) -> None:
        ensemble = Ensemble([classifier(*last)], outputs=outputs)
        np.testing.assert_allclose(ensemble.predict_probs(IMAGES)[0], numpy_softmax(classifier()), atol=1e-5)
        assert ensemble.outputs == ["logits"]

    def test_members_of_both_kinds_said_or_found(self) -> None:
        members = [classifier(nn.Softmax(1)), classifier(), Ensemble([classifier()])]
        said = Ensemble(members, outputs=["probs", "logits", None])
        with pytest.warns(UserWarning, match="Member 0"):
            found = Ensemble(members).predict_probs(IMAGES)
        for probs in (*found, *said.predict_probs(IMAGES)):
            np.testing.assert_allclose(probs, numpy_softmax(classifier()), atol=1e-5)

    def test_a_tree_of_scikit_learn(self) -> None:
        # Which returns exact zeros and ones.
        points, classes = make_blobs(60, 48, random_state=0)
        tree = DecisionTreeClassifier(max_depth=2, random_state=0).fit(points, classes)

        class Tree(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.from_numpy(tree.predict_proba(images.flatten(1).numpy()))

        inputs = torch.from_numpy(points.astype(np.float32)).view(60, 3, 4, 4)
        probs = Ensemble([Tree()], outputs="probs").predict_probs(inputs)[0]
        np.testing.assert_allclose(probs, tree.predict_proba(points.astype(np.float32)), atol=1e-6)

    def test_functions_that_predict(self) -> None:
        expected = numpy_softmax(classifier())
        member = classifier(nn.Softmax(1))
        probs, labels = predict_batches(member, LOADER, outputs="probs")
        np.testing.assert_allclose(probs, expected, atol=1e-6)
        np.testing.assert_array_equal(labels, LABELS)
        with pytest.warns(UserWarning, match="Member 1") as told:
            both, _ = predict_members([classifier(), member], LOADER)
        assert len(told) == 1
        np.testing.assert_allclose(both, np.stack([expected] * 2), atol=1e-6)
        with pytest.warns(UserWarning, match="The model returns class probabilities"):
            nll, _ = evaluate_on_val(member, LOADER)
        of_labels = np.clip(expected[np.arange(20), LABELS.numpy()], 1e-12, 1.0)
        assert nll == pytest.approx(-np.log(of_labels).mean(), rel=1e-4)

    def test_what_is_said_must_be_so(self) -> None:
        with pytest.raises(UserError, match="Member 0 should return probabilities") as caught:
            Ensemble([classifier()], outputs="probs").predict_probs(IMAGES)
        assert 'outputs="logits"' in caught.value.remedy
        with pytest.raises(UserError, match="should return probabilities"):
            predict_batches(classifier(nn.Sigmoid()), LOADER, outputs="probs")
        # Two numbers that add up to 1 by chance, told to be logits.
        expected = 1 / (1 + np.exp(0.5))
        member = Returning(lambda logits: torch.tensor([[0.25, 0.75]]).expand(len(logits), 2))
        probs = Ensemble([member], outputs="logits").predict_probs(IMAGES)[0]
        np.testing.assert_allclose(probs[:, 0], expected, rtol=1e-6)

    @pytest.mark.parametrize("outputs", ["softmax", 3, ["probs"], [["probs"], "logits"], {"probs"}])
    def test_other_words_are_refused(self, outputs: Any) -> None:
        with pytest.raises(UserError, match="outputs"):
            Ensemble([classifier(), classifier()], outputs=outputs)
        with pytest.raises(UserError, match="outputs"):
            predict_batches(classifier(), LOADER, outputs=outputs)

    def test_a_decision_waits_for_values(self) -> None:
        broken = IMAGES[:2].clone()
        broken[0] = torch.nan
        ensemble = Ensemble([classifier(nn.Softmax(1))]).eval()
        assert ensemble(broken)[0].isnan().all()
        ensemble(IMAGES[:0])
        assert ensemble.outputs == [None]
        with pytest.warns(UserWarning, match="probabilities"):
            np.testing.assert_allclose(ensemble(IMAGES).detach(), numpy_softmax(classifier()), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("outputs", [None, "probs"])
    def test_a_graph_is_right_about_both(self, outputs: Any) -> None:
        said = None if outputs is None else ["probs", "logits"]
        ensemble = Ensemble([classifier(nn.Softmax(1)), classifier()], outputs=said).eval()
        expected = numpy_softmax(classifier())
        batch = {"images": {0: torch.export.Dim("batch", min=2)}}
        exported = torch.export.export(ensemble, (IMAGES[:7],), dynamic_shapes=batch).module()
        compiled = torch.compile(ensemble, backend="eager", fullgraph=True)
        for graph in (exported, compiled):
            np.testing.assert_allclose(graph(IMAGES).detach(), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("last", [(), (nn.Softmax(1),)], ids=["logits", "probabilities"])
    def test_gradients_of_a_graph_are_finite(self, last: tuple[nn.Module, ...]) -> None:
        # A classifier that begins at zero, as in fine-tuning: its outputs sum to 0.
        member = classifier(*last, scale=0.0)
        nn.init.zeros_(member[1].bias)
        compiled = torch.compile(Ensemble([member]), backend="eager", fullgraph=True)
        compiled(IMAGES)[:, 0].log().sum().backward()
        # The gradient of ln p_0 at equal probabilities: 1 - 1/3 for its own logit and -1/3 for the others.
        expected = 20 * np.array([2 / 3, -1 / 3, -1 / 3])
        np.testing.assert_allclose(member[1].bias.grad, expected, rtol=1e-4)


class TestOtherOutputs:
    """What is no (B, K) is named, with what to do."""

    @pytest.mark.parametrize(
        ("make", "named"),
        [
            (lambda z: (z, z), r"a tuple of 2 \(Tensor \(8, 3\), Tensor \(8, 3\)\)"),
            (lambda z: [z], r"a list of 1 \(Tensor \(8, 3\)\)"),
            (lambda z: {"out": z, "aux": z}, "a dict with the keys out, aux"),
            (lambda z: UserDict(logits=z), "a UserDict with the keys logits"),
            (lambda z: namedtuple("Inception", "logits aux_logits")(z, None), "a Inception of 2"),
            (lambda z: dataclasses.make_dataclass("Classified", ["logits"])(z), "a Classified"),
            (lambda z: z.numpy(), "a ndarray"),
            (lambda z: None, "a NoneType"),
            (lambda z: z[:, :, None], r"\(8, 3, 1\)"),
            (lambda z: z.reshape(-1, 1)[:, :, None].reshape(4, 6), r"\(4, 6\) for 8 images"),
            (lambda z: z.sum(), r"\(\) for 8 images"),
        ],
    )
    def test_other_forms(self, make: Callable[[Tensor], Any], named: str) -> None:
        with pytest.raises(UserError, match=f"Member 0 returns {named}.* instead of logits") as caught:
            predict_members([Returning(make)], LOADER)
        assert "module that returns the logits" in caught.value.remedy
        assert ".logits" in caught.value.remedy or not hasattr(make(torch.ones(8, 3)), "logits")

    @pytest.mark.parametrize("make", [lambda z: z[:, 0], lambda z: z[:, :1], lambda z: z[:, :1, None, None]])
    def test_one_number_an_image(self, make: Callable[[Tensor], Tensor]) -> None:
        with pytest.raises(UserError, match="returns one number an image") as caught:
            Ensemble([Returning(make)]).predict_probs(IMAGES)
        assert "torch.cat([torch.zeros_like(z), z], dim=1)" in caught.value.remedy
        # Which is right: the sigmoid of z.
        z = torch.linspace(-3, 3, 20)[:, None]
        both = Returning(lambda logits: torch.cat([torch.zeros_like(z), z], dim=1))
        np.testing.assert_allclose(
            Ensemble([both]).predict_probs(IMAGES)[0, :, 1], 1 / (1 + np.exp(-z[:, 0].numpy())), rtol=1e-5
        )

    def test_a_convolution_as_classifier(self) -> None:
        found = Ensemble([Returning(lambda z: z[:, :, None, None])]).predict_probs(IMAGES)[0]
        np.testing.assert_allclose(found, numpy_softmax(classifier()), atol=1e-5)


def bright(*shape: int, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Batches of images that differ in brightness, as photos do, of given sizes."""
    generator = torch.Generator().manual_seed(sum(sizes))
    images = torch.randn(sum(sizes), *shape, generator=generator)
    images += 3 * torch.randn(sum(sizes), shape[0], *(1 for _ in shape[1:]), generator=generator)
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(sizes)]


def by_hand(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Mean over all images, mean unbiased variance of the batches by their images, and the batches normalised."""
    axes = (0, *range(2, batches[0].ndim))
    sizes = [len(batch) for batch in batches]
    variances = [batch.var(axis=axes, ddof=1) for batch in batches]
    normalised = [
        (batch - batch.mean(axis=axes, keepdims=True)) / np.sqrt(batch.var(axis=axes, keepdims=True) + 1e-5)
        for batch in batches
    ]
    return (
        np.concatenate(batches).mean(axis=axes),
        np.average(variances, axis=0, weights=sizes),
        normalised,
    )


class TestBatchNormStatistics:
    """Every image counts the same, whatever batch it comes in."""

    @pytest.mark.parametrize("sizes", [(16, 3), (2, 31, 5)])
    @pytest.mark.parametrize(
        ("norm", "shape"),
        [
            (nn.BatchNorm1d, (3,)),
            (nn.BatchNorm1d, (3, 5)),
            (nn.BatchNorm2d, (3, 4, 5)),
            (nn.BatchNorm3d, (3, 2, 3, 4)),
        ],
    )
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_two_layers_under_dropout(
        self,
        norm: Callable[..., nn.Module],
        shape: tuple[int, ...],
        sizes: tuple[int, ...],
        momentum: float | None,
    ) -> None:
        batches = bright(*shape, sizes=sizes)
        model = nn.Sequential(
            nn.Dropout(), norm(3, momentum=momentum), nn.ReLU(), nn.Dropout(), norm(3, momentum=momentum)
        )
        assert recompute_batch_norm(model, batches)
        values = [inputs.double().numpy() for inputs, _ in batches]
        for layer in (model[1], model[4]):
            mean, variance, values = by_hand(values)
            np.testing.assert_allclose(layer.running_mean, mean, atol=2e-5)
            np.testing.assert_allclose(layer.running_var, variance, rtol=1e-4)
            assert (layer.momentum, int(layer.num_batches_tracked)) == (momentum, len(sizes))
            assert not layer._forward_pre_hooks
            values = [np.maximum(each, 0.0) for each in values]

    def test_a_single_image_at_the_end(self) -> None:
        # Of one image there is no spread between images: it must not halve the variance.
        batches = bright(3, 8, 8, sizes=(256, 1))
        model = nn.Sequential(nn.BatchNorm2d(3))
        recompute_batch_norm(model, batches)
        images = torch.cat([inputs for inputs, _ in batches]).double().numpy()
        np.testing.assert_allclose(model[0].running_mean, images.mean(axis=(0, 2, 3)), atol=1e-5)
        np.testing.assert_allclose(model[0].running_var, images.var(axis=(0, 2, 3)), rtol=0.02)

    def test_batches_of_one_size_are_averaged_to_the_bit_as_torch_does(self) -> None:
        batches = bright(3, 8, 8, sizes=(7,) * 9)
        ours, theirs = (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in "ab")
        theirs.load_state_dict(ours.state_dict())
        recompute_batch_norm(ours, batches)
        torch.optim.swa_utils.update_bn(batches, theirs)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name

    def test_a_layer_that_is_used_twice_sees_both(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(3)

            def forward(self, inputs: Tensor) -> Tensor:
                return self.norm(inputs) + self.norm(10 * inputs)

        batches = bright(3, sizes=(16, 4))
        model = Twice()
        recompute_batch_norm(model, batches)
        seen = [scale * inputs.double().numpy() for inputs, _ in batches for scale in (1, 10)]
        mean, variance, _ = by_hand(seen)
        np.testing.assert_allclose(model.norm.running_mean, mean, atol=1e-4)
        np.testing.assert_allclose(model.norm.running_var, variance, rtol=1e-4)

    def test_a_compiled_network(self) -> None:
        batches = bright(3, 4, 4, sizes=(16, 2))
        plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).train()
        compiled = torch.compile(plain, backend="eager")
        # Compiled in the mode that statistics are computed in, before they are.
        compiled(batches[0][0])
        recompute_batch_norm(compiled, batches)
        mean, variance, _ = by_hand([inputs.double().numpy() for inputs, _ in batches])
        np.testing.assert_allclose(plain[0].running_mean, mean, atol=1e-5)
        np.testing.assert_allclose(plain[0].running_var, variance, rtol=1e-5)

    def test_everything_that_averages_weighs_by_images(self) -> None:
        batches = bright(3, 4, 4, sizes=(16, 2))
        mean, variance, _ = by_hand([inputs.double().numpy() for inputs, _ in batches])
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
        average = PolyakAverage(model)
        average.after_step(model)
        settings = EvolutionSettings(population_size=5, generations=1)
        evolved = evolve_simplex(model, [model, model], batches, batches, settings=settings).state
        for state in (
            averaged_model(model, [model, model], None, batches).state_dict(),
            greedy_soup(model, [model, model], batches, batches).model.state_dict(),
            average.finished(batches).state_dict(),
            evolved,
        ):
            np.testing.assert_allclose(state["0.running_mean"], mean, atol=1e-5)
            np.testing.assert_allclose(state["0.running_var"], variance, rtol=1e-5)


class TestBatchForms:
    """A batch is a pair, or a dict whose keys leave no doubt."""

    @pytest.mark.parametrize("kind", [dict, UserDict])
    def test_dicts(self, kind: Callable[..., Any]) -> None:
        for images, labels in itertools.product(INPUT_KEYS, LABEL_KEYS):
            pair = as_pair(kind({images: IMAGES, labels: LABELS, "index": torch.arange(20)}))
            assert pair[0] is IMAGES
            assert pair[1] is LABELS

    def test_predictions_and_statistics_from_dicts(self) -> None:
        dicts = [{"pixel_values": inputs, "labels": labels, "id": "a"} for inputs, labels in LOADER]
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3))
        for batches in (LOADER, dicts):
            recompute_batch_norm(model, batches)
        probs, labels = predict_batches(model, dicts)
        np.testing.assert_array_equal(probs, predict_batches(model, LOADER)[0])
        np.testing.assert_array_equal(labels, LABELS)

    @pytest.mark.parametrize(
        ("batch", "named"),
        [
            ((IMAGES, LABELS, torch.arange(20)), "a tuple of 3"),
            ([IMAGES], "a list of 1"),
            (IMAGES, "a Tensor of shape"),
            (IMAGES[:2], "a Tensor of shape"),
            ({"images": IMAGES}, "a dict with the keys images"),
            ({"images": IMAGES, "img": IMAGES, "y": LABELS}, "a dict with the keys images, img, y"),
            ({"x": IMAGES, "label": LABELS, "targets": LABELS}, "keys x, label, targets"),
            ({"x": IMAGES, "label": "cat"}, "a dict"),
            ((IMAGES[0], 3), "a tuple of 2 (Tensor (3, 4, 4), int)"),
            ((IMAGES.numpy(), LABELS), "a tuple of 2 (ndarray, Tensor (20,))"),
            ("images", "a str"),
        ],
    )
    def test_others_are_named(self, batch: Any, named: str) -> None:
        for use in (
            lambda: predict_batches(classifier(), [batch]),
            lambda: Ensemble([classifier()]).evaluate([batch]),
        ):
            with pytest.raises(UserError) as caught:
                use()
            assert named in caught.value.cause
            assert "Give batches of two tensors" in caught.value.remedy
        with pytest.raises(UserError, match="A batch is"):
            recompute_batch_norm(nn.BatchNorm2d(3), [batch])

    @pytest.mark.parametrize("labels", [LABELS.float(), nn.functional.one_hot(LABELS), LABELS[:, None], LABELS[1:]])
    def test_labels_that_are_no_class_indices(self, labels: Tensor) -> None:
        for use in (predict_batches, lambda model, batches: Ensemble([model]).calibrate(batches)):
            with pytest.raises(UserError, match="labels of 20 images are"):
                use(classifier(), [(IMAGES, labels)])

    def test_what_are_no_batches(self) -> None:
        with pytest.raises(UserError, match="A int was given where batches are wanted"):
            predict_batches(classifier(), 3)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="a Dataset goes into a DataLoader"):
            predict_batches(classifier(), TensorDataset(IMAGES, LABELS))
