import copy
from dataclasses import replace

import pytest
import torch
from tiny import genotype

from dnas_ens.config import RetrainConfig
from dnas_ens.ensembles import Ensemble
from dnas_ens.nn.network import Network
from dnas_ens.space.stack import StackSpec
from dnas_ens.training.distillation import StudentTraining

RECIPE = RetrainConfig(
    num_cells=1, channels=4, epochs=1, batch_size=32, augment=False, learning_rate=0.01, weight_decay=0.01
)


@pytest.fixture
def teacher(few_digits):
    torch.manual_seed(0)
    stack = StackSpec.for_data(few_digits, space="darts", num_cells=1, channels=4, stem_stride=None)
    # Sharp, so that an untrained teacher has something to say.
    return Ensemble([Network(genotype(index), stack) for index in (0, 1)], temperature=0.2).eval()


def student(teacher, data, **fields):
    return StudentTraining(genotype(), data, replace(RECIPE, **fields), teacher=teacher, teacher_is="t", index=0)


def test_a_step_descends_the_cross_entropy_with_the_ensembles_probabilities(few_digits, teacher):
    training = student(teacher, few_digits, batch_size=len(few_digits.train), gradient_clip=1e9)
    network = copy.deepcopy(training.network).train()
    order = torch.randperm(len(few_digits.train), generator=torch.Generator().manual_seed(training.seeds.order))
    images = training.augmentation.normalise(few_digits.train.images[order])
    with torch.no_grad():
        averaged = torch.stack([member(images).softmax(1) for member in teacher.members]).mean(0)
        targets = averaged ** (1 / 0.2) / (averaged ** (1 / 0.2)).sum(1, keepdim=True)
    loss = -(targets * network(images).log_softmax(1)).sum(1).mean()
    loss.backward()
    scalars = training.run_epoch()
    assert scalars["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for before, after in zip(network.parameters(), training.network.parameters(), strict=True):
        step = before.detach() - RECIPE.learning_rate * (before.grad + RECIPE.weight_decay * before.detach())
        torch.testing.assert_close(after.detach(), step, rtol=1e-3, atol=1e-5)


def test_a_student_comes_to_say_what_the_teacher_says_whatever_the_labels(few_digits, teacher):
    training = student(teacher, few_digits, epochs=30, learning_rate=0.05)
    first = training.run_epoch()
    while training.epoch < 30:
        last = training.run_epoch()
    assert last["train_accuracy"] > max(0.6, first["train_accuracy"])
    said = torch.from_numpy(training.val_probs()).argmax(1)
    expected = torch.from_numpy(teacher.predict_probs(training.augmentation.normalise(few_digits.val.images))).mean(0)
    assert (said == expected.argmax(1)).float().mean() > 0.5


def test_a_state_of_another_teacher_is_another_one(few_digits, teacher):
    one = student(teacher, few_digits).identity()
    other = StudentTraining(genotype(), few_digits, RECIPE, teacher=teacher, teacher_is="u", index=0).identity()
    assert {name for name in one if one[name] != other[name]} == {"teacher"}
