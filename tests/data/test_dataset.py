import base64
import dataclasses
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.data import ImageData, Split, iterate_batches
from dnas_ens.data.dataset import measure_normalisation
from dnas_ens.errors import UserError


def split_of(num=6, *, channels=1, size=4, label=None):
    labels = torch.arange(num) % 2 if label is None else torch.full((num,), label)
    return Split(torch.arange(num * channels * size * size).reshape(num, channels, size, size).byte(), labels)


def test_split_length_subset_and_device():
    split = split_of(6)
    for indices in ([4, 1], np.array([4, 1]), torch.tensor([4, 1], dtype=torch.int32)):
        part = split.subset(indices)
        assert torch.equal(part.images, torch.stack([split.images[4], split.images[1]]))
        assert part.labels.tolist() == [0, 1]
    assert (len(split), len(split.subset([]))) == (6, 0)
    moved = split.to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    with pytest.raises(UserError, match="asked for by a mask"):
        split_of(2).subset([True, False])


def test_drawn_images_are_some_of_all_in_an_order_that_repeats():
    split = Split(split_of(20).images, torch.arange(20))
    order = split.drawn().labels.tolist()
    assert order != sorted(order) == list(range(20))
    assert torch.equal(split.drawn(8).images, split.images[order[:8]])
    assert split.drawn(50).labels.tolist() == order


IMAGES, LABELS = torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("images", "labels", "cause"),
    [
        (IMAGES.int(), LABELS, r"torch.int32 of shape \(2, 1, 4, 4\)"),
        (torch.zeros(2, 4, 4).byte(), LABELS, r"torch.uint8 of shape \(2, 4, 4\)"),
        (IMAGES.numpy(), LABELS, "images are a ndarray"),
        (IMAGES, LABELS.tolist(), "labels are a list"),
        (IMAGES, LABELS.float(), "labels are torch.float32"),
        (IMAGES, LABELS[:, None], r"shape \(2, 1\)"),
        (IMAGES, torch.zeros(3, dtype=torch.int64), "2 images but 3 labels"),
        (IMAGES, LABELS.to("meta"), "its labels on meta"),
    ],
)
def test_split_refuses_wrong_tensors(images, labels, cause):
    with pytest.raises(UserError, match=cause):
        Split(images, labels)


def test_floats_are_a_split_but_no_data_set(make_data):
    data = make_data()
    floats = Split(data.val.images / 255, data.val.labels)
    for name in ("train", "val", "test"):
        with pytest.raises(UserError, match=rf"The images of {name} are torch\.float32, but they are to be normalised"):
            dataclasses.replace(data, **{name: floats})
    with pytest.raises(UserError, match="to be normalised"):
        next(iterate_batches(floats, 4))


def test_classes_become_texts_or_are_refused(make_data):
    data = make_data(classes=2)
    for given, names in ((np.unique([7, 3]), ("3", "7")), (np.array(["ant", "bee"]), ("ant", "bee"))):
        built = ImageData.from_splits("made", given, **data.named_splits(), flip=True)
        assert built.classes == names
    for given, cause in ((2, "The classes are 2"), (["all"], "The data have 1 class")):
        with pytest.raises(UserError, match=cause):
            ImageData.from_splits("made", given, **data.named_splits(), flip=True)
    with pytest.raises(UserError, match="not a text for each"):
        dataclasses.replace(data, classes=(3, 7))


def test_normalisation_is_of_all_the_training_images_and_of_no_others():
    # The third channel is constant, which is divided by 1.
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 4, 4), dtype=np.uint8)
    images[2000:] //= 2
    images[:, 2] = 9
    train = Split(torch.from_numpy(images), torch.arange(2500) % 2)
    other = split_of(channels=3)
    data = ImageData.from_splits("made", "ab", train=train, val=other, test=other, flip=True)
    np.testing.assert_allclose(data.mean, images.mean(axis=(0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(data.std, [*images[:, :2].std(axis=(0, 2, 3)) / 255, 1], rtol=1e-12)
    assert (data.image_size, data.num_channels, data.num_classes) == (4, 3, 2)
    with pytest.raises(UserError, match="no training images"):
        measure_normalisation(torch.empty(0, 1, 8, 8, dtype=torch.uint8))


def test_fingerprint_changes_with_one_pixel_label_or_index(make_data):
    data = make_data()

    def fingerprint(**changed):
        arguments = {**data.named_splits(), "splits": data.splits, "flip": True, **changed}
        return ImageData.from_splits("made", data.classes, **arguments).fingerprint

    assert fingerprint() == data.fingerprint == make_data().fingerprint
    seen = {data.fingerprint}
    for name, split in data.named_splits().items():
        images, labels = split.images.clone(), split.labels.clone()
        images[3, 0, 2, 1] ^= 1
        labels[3] = (labels[3] + 1) % 4
        indices = list(data.splits[name])
        indices[0], indices[1] = indices[1], indices[0]
        seen.add(fingerprint(**{name: Split(images, split.labels)}))
        seen.add(fingerprint(**{name: Split(split.images, labels)}))
        seen.add(fingerprint(splits={**data.splits, name: indices}))
    assert len(seen) == 10


def test_split_fingerprint_sees_the_shape_and_not_the_strides():
    pixels, labels = torch.arange(2 * 16, dtype=torch.uint8), torch.tensor([0, 1])
    square = Split(pixels.view(2, 1, 4, 4), labels)
    assert Split(pixels.view(2, 1, 2, 8), labels).fingerprint() != square.fingerprint()
    assert Split(pixels.view(2, 4, 4, 1).permute(0, 3, 1, 2), labels).fingerprint() == square.fingerprint()


def test_search_halves_are_disjoint_and_complete(make_data):
    data = make_data(41)
    weight, architecture = data.search_halves(seed=7)
    halves = [{image.numpy().tobytes() for image in split.images} for split in (weight, architecture)]
    assert list(map(len, halves)) == [21, 20]
    assert halves[0] | halves[1] == {image.numpy().tobytes() for image in data.train.images}
    assert data.search_halves(seed=8)[0].fingerprint() != weight.fingerprint()


def test_describe_is_json_ready(make_data):
    data = make_data(40, channels=3)
    described = json.loads(json.dumps(data.describe()))
    assert (described["fingerprint"], described["mean"]) == (data.fingerprint, list(data.mean))
    assert (described["num_channels"], described["image_size"], described["flip"]) == (3, 8, True)
    counts = {key: value["class_counts"] for key, value in described["splits"].items()}
    assert counts == {"train": [10] * 4, "val": [5] * 4, "test": [5] * 4}
    assert described["splits"]["train"]["fingerprint"] == data.train.fingerprint()
    assert data.to(torch.device("cpu")).fingerprint == data.fingerprint
    assert make_data(4, classes=2).splits == {"train": [0, 1, 2, 3], "val": [4, 5], "test": [6, 7]}


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"train": split_of(size=4), "val": split_of(size=5)}, "Images of val are (1, 5, 5), of train (1, 4"),
        ({"test": split_of(channels=3)}, "Images of test are (3, 4, 4)"),
        ({"val": split_of(0)}, "The val split is empty"),
        ({"test": split_of(label=2)}, "Labels of test reach from 2 to 2, but there are 2 classes"),
        ({"splits": {"train": [0], "val": range(6), "test": range(6)}}, "indices of train do not number 6"),
        ({"train": Split(torch.zeros(2, 1, 4, 6).byte(), LABELS)}, "The images are 4x6"),
        ({"train": Split(torch.zeros(2, 2, 4, 4).byte(), LABELS)}, "The images have 2 channels"),
    ],
)
def test_contradictions_are_refused(changed, cause):
    parts = {"train": split_of(), "val": split_of(), "test": split_of(), "flip": False}
    with pytest.raises(UserError, match=re.escape(cause)):
        ImageData.from_splits("made", ("a", "b"), **{**parts, **changed})
    for wrong in ({"mean": (0.5, 0.5)}, {"std": (0.0,)}):
        with pytest.raises(UserError, match="do not fit 1 channels"):
            dataclasses.replace(ImageData.from_splits("made", ("a", "b"), **parts), **wrong)


def test_what_is_printed_is_short_and_a_notebook_shows_a_table_and_a_picture(make_data):
    many = dataclasses.replace(make_data(), classes=tuple(f"class {index}" for index in range(1000)))
    assert "40 train, 20 val, 20 test; 1x8x8" in repr(many)
    assert len(repr(many)) < 400
    assert repr(many.train) == "Split(40 images, 1x8x8, on cpu)"
    data = dataclasses.replace(make_data(channels=3), name="a<b")
    shown = data._repr_html_()
    root = ElementTree.fromstring(f"<div>{shown}</div>")
    assert "".join(root.itertext()).startswith("a<b: images of 3x8x8")
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert rows == [["split", "images"], ["train", "40"], ["val", "20"], ["test", "20"]]
    picture = base64.b64decode(root.find("img").get("src").removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB").resize((32, 8), Image.Resampling.NEAREST))
    assert np.array_equal(pixels, data.train.images[:4].permute(2, 0, 3, 1).reshape(8, 32, 3))
