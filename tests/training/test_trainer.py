import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import genotype
from torch import nn
from torch.optim.swa_utils import update_bn

from dnas_ens.config import RetrainConfig
from dnas_ens.data import ImageData, Split
from dnas_ens.data.batches import Augmentation, epoch_indices
from dnas_ens.errors import DivergedError
from dnas_ens.training.batch_norm import accuracy_under_batch_statistics, batch_statistics, recalibrate
from dnas_ens.training.interleaving import in_turns
from dnas_ens.training.prediction import predict_log_probs
from dnas_ens.training.step import (
    FiniteWatch,
    MemberSeeds,
    cosine_learning_rate,
    drop_path_at,
    require_finite,
    set_learning_rate,
)
from dnas_ens.training.trainer import MemberTraining, Training

PLAIN = Augmentation(pad=0, flip=False, cutout=0, mean=(0.0,), std=(1.0,))


def split(count=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Split(images=images, labels=torch.arange(count) % 3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))


def test_recalibrated_statistics_are_those_of_all_classes_where_images_come_sorted():
    # As a folder's do. A batch of one class has the variance within that class, a tenth of the whole one here.
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(512)
    noise = torch.randint(-35, 36, (1024, 1, 4, 4), generator=generator)
    images = (60 + 120 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8)
    recalibrate(net, Split(images, labels), augmentation=PLAIN, num_images=512)
    features = net[0](images.float() / 255).detach()
    torch.testing.assert_close(net[1].running_var, features.var().view(1), rtol=0.02, atol=0)
    torch.testing.assert_close(net[1].running_mean, features.mean().view(1), rtol=0.05, atol=0)


def test_batch_statistics_normalise_each_batch_and_change_nothing():
    net, images = network(), split(64).images.float() / 255
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()
    with batch_statistics(net):
        normalised = net[1](net[0](images))
    assert float(normalised.mean((0, 2, 3)).detach().abs().max()) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not net[1].training
    assert net[1].track_running_stats
    data = split(30)
    with torch.no_grad(), batch_statistics(net):
        right = (net(data.images.float() / 255).argmax(-1) == data.labels).float().mean()
    measured = accuracy_under_batch_statistics(net, net, data, augmentation=PLAIN)
    assert measured == pytest.approx(float(right))


def test_predictions_keep_the_order_and_the_mode():
    net, images = network(), split(700)
    log_probs = predict_log_probs(net.train(), images, augmentation=PLAIN)
    assert net.training
    with torch.no_grad():
        expected = net.eval()(images.images.float() / 255).log_softmax(-1)
    torch.testing.assert_close(log_probs, expected)


def test_schedules_against_the_formulas():
    recipe = RetrainConfig(epochs=10, learning_rate=0.2, drop_path=0.3)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 10)
    for epoch in range(10):
        assert cosine_learning_rate(recipe.learning_rate, epoch, recipe.epochs) == pytest.approx(
            schedule.get_last_lr()[0]
        )
        reference.step()
        schedule.step()
    np.testing.assert_allclose([drop_path_at(0.3, e, 10) for e in (0, 5, 9)], [0.0, 0.15, 0.27])


def test_the_first_step_that_is_not_finite_is_named():
    with pytest.raises(DivergedError, match="loss not finite in epoch 3"):
        require_finite({"loss": math.nan, "accuracy": 0.5}, where="epoch 3")
    watch, module = FiniteWatch(torch.device("cpu")), torch.nn.Linear(2, 2)
    watch.note(torch.tensor(1.0))
    watch.require_finite(module, where="epoch 1")
    # Counted from there anew.
    for norm in (1.0, math.inf, 3.0, math.nan):
        watch.note(torch.tensor(norm))
    with pytest.raises(DivergedError, match=r"gradient of step 2 in epoch 2 is not finite\."):
        watch.require_finite(module, where="epoch 2")
    watch.require_finite(module, where="epoch 3")
    with torch.no_grad():
        module.bias[1] = math.inf
    with pytest.raises(DivergedError, match="bias is not finite after the last step in epoch 4"):
        watch.require_finite(module, where="epoch 4")


def test_an_error_ends_the_other_works():
    closed = []

    def work(fails):
        try:
            yield
            if fails:
                raise ValueError("broken")
            yield
        finally:
            closed.append(fails)

    with pytest.raises(ValueError, match="broken"):
        in_turns([(step for step in ()), work(False), work(True), work(False)])
    assert closed == [True, False, False]


POINTS, CLASSES = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def points_training(seed=0, **fields):
    def batches(order, augmentation):
        for chosen in torch.randperm(12, generator=order).split(5):
            noise = torch.randn(len(chosen), 2, generator=augmentation)
            yield POINTS[chosen] + 0.1 * noise, CLASSES[chosen]

    recipe = RetrainConfig(epochs=4, learning_rate=0.1, weight_decay=0.01, gradient_clip=0.5, **fields)
    seeds = MemberSeeds(initialisation=1, order=2, augmentation=3 + seed)
    return Training(lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), batches, recipe, seeds, name="points")


def test_any_module_trains_on_any_batches_as_a_loop_by_hand():
    training, taken = points_training(), []
    twin = copy.deepcopy(training.network)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    order, noise = torch.Generator().manual_seed(2), torch.Generator().manual_seed(3)

    def on_step():
        taken.append(training.learning_rate)
        set_learning_rate(training.optimizer, 0.5 * training.learning_rate)

    for epoch in range(2):
        # The schedule goes on where the hook of the last step left it.
        scalars = training.run_epoch(learning_rate=training.learning_rate, on_step=on_step)
        total = 0.0
        for chosen in torch.randperm(12, generator=order).split(5):
            inputs = POINTS[chosen] + 0.1 * torch.randn(len(chosen), 2, generator=noise)
            loss = nn.functional.cross_entropy(twin(inputs), CLASSES[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
            set_learning_rate(optimizer, 0.5 * optimizer.param_groups[0]["lr"])
            total += float(loss.detach()) * len(chosen)
        assert training.epoch == epoch + 1
        assert scalars["train_loss"] == pytest.approx(total / 12)
    assert taken == [0.1 * 0.5**step for step in range(6)]
    for ours, theirs in zip(training.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_training_goes_on_or_branches_off():
    def weights(training):
        return torch.cat([parameter.detach().flatten() for parameter in training.network.parameters()])

    training = points_training()
    training.run_epoch()
    state = copy.deepcopy(training.state_dict())
    training.run_epoch()
    resumed, branch = points_training(), points_training(seed=1)
    resumed.load_state_dict(state)
    branch.branch_off(state)
    for other in (resumed, branch):
        other.run_epoch()
    assert torch.equal(weights(resumed), weights(training))
    assert not torch.equal(weights(branch), weights(training))
    measured = points_training(precision="measured")
    assert not measured.execution_is_settled
    assert measured.run_epoch()["train_loss"] == pytest.approx(points_training().run_epoch()["train_loss"], rel=0.02)


def test_the_last_weights_are_averaged_also_by_a_training_that_goes_on(few_digits):
    images = few_digits.train.images
    recipe = RetrainConfig(num_cells=1, channels=4, epochs=5, batch_size=len(images), average_last=0.5)

    def training():
        return MemberTraining(genotype(0), few_digits, recipe, index=1)

    whole, seen, rates = training(), [], []

    def note():
        seen.append({name: weights.detach().clone() for name, weights in whole.network.named_parameters()})

    while whole.epoch < 5:
        saved = copy.deepcopy(whole.state_dict()) if whole.epoch == 4 else None
        rates.append(whole.run_epoch(on_step=note)["learning_rate"])
    assert rates == pytest.approx(
        [0.05 * (0.25 + 0.75 * (1 + math.cos(math.pi * epoch / 5)) / 2) for epoch in range(5)]
    )
    order = torch.Generator().set_state(whole.order.get_state())
    drawn = torch.Generator().set_state(whole.augmentation_generator.get_state())
    whole.end()
    # Two of five epochs, the last half rounded down; an epoch is one step.
    for name, parameter in whole.network.named_parameters():
        torch.testing.assert_close(parameter, (seen[3][name] + seen[4][name]) / 2)
    # The statistics of its BatchNorm are those of as many augmented epochs as have 2,048 images.
    batches = []
    for _ in range(math.ceil(2048 / len(images))):
        (index,) = epoch_indices(few_digits.train, len(images), generator=order, drop_last=True)
        draws = whole.augmentation.draw(len(images), height=8, width=8, generator=drawn)
        batches.append(whole.augmentation.apply(images[index], draws))
    witness = copy.deepcopy(whole.network)
    update_bn(batches, witness)
    for name, buffer in witness.named_buffers():
        torch.testing.assert_close(whole.network.get_buffer(name), buffer)

    resumed = training()
    resumed.load_state_dict(saved)
    resumed.run_epoch()
    resumed.end()
    state = resumed.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.network.state_dict().items())


@pytest.mark.parametrize(("epochs", "share"), [(3, 0.25), (4, 0.0)])
def test_without_an_average_the_rate_falls_to_0(few_digits, epochs, share):
    recipe = RetrainConfig(num_cells=1, channels=4, epochs=epochs, batch_size=12, average_last=share)
    training = MemberTraining(genotype(0), few_digits, recipe, index=1)
    rates = [training.run_epoch()["learning_rate"] for _ in range(epochs)]
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)])
    before = copy.deepcopy(training.network.state_dict())
    training.end()
    assert all(torch.equal(value, before[name]) for name, value in training.network.state_dict().items())


def test_weights_of_classes_are_those_of_a_loss_by_hand(few_digits):
    keep = torch.cat([(few_digits.train.labels == label).nonzero()[: 3 + 6 * label, 0] for label in (0, 1)])
    train = few_digits.train.subset(keep)
    data = ImageData.from_splits(
        "two", few_digits.classes, train=train, val=few_digits.val, test=few_digits.test, flip=False
    )
    recipe = RetrainConfig(num_cells=1, channels=4, epochs=1, batch_size=len(keep), augment=False, balance="weights")
    recipe = replace(recipe, weight_decay=0.0, gradient_clip=math.inf, label_smoothing=0.1)
    training = MemberTraining(genotype(), data, recipe, index=0)
    network = copy.deepcopy(training.network).train()
    images = Augmentation.for_data(data, augment=False).normalise(train.images)
    weights = torch.zeros(10)
    for label in (0, 1):
        weights[label] = len(keep) / (2 * int((train.labels == label).sum()))
    log_probs = network(images).log_softmax(1)
    rows = -log_probs[torch.arange(len(keep)), train.labels]
    # Smoothed, each class in proportion to its weight.
    others = -(log_probs * weights).sum(1) / 10
    loss = (0.9 * rows * weights[train.labels] + 0.1 * others).sum() / weights[train.labels].sum()
    (gradient,) = torch.autograd.grad(loss, network.classifier.bias)
    # What is told is neither weighted nor smoothed, like the loss on val.
    assert training.run_epoch()["train_loss"] == pytest.approx(rows.mean().item(), rel=1e-4)
    expected = network.classifier.bias - recipe.learning_rate * gradient
    torch.testing.assert_close(training.network.classifier.bias, expected, rtol=1e-4, atol=1e-6)


def test_drop_path_rises_to_its_end_in_a_training_that_is_shortened(few_digits):
    training = MemberTraining(genotype(0), few_digits, RetrainConfig(num_cells=1, epochs=10, drop_path=0.4), index=0)
    training.epoch, training.total_epochs = 3, 4
    assert training._drop_path_now() == pytest.approx(0.3)
