import errno
import functools
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dnas_ens.data.folder import load_folder
from dnas_ens.data.images import read_image
from dnas_ens.errors import UserError


def refusal(root, **arguments):
    with pytest.raises(UserError) as caught:
        load_folder(root, **arguments)
    cause, remedy = caught.value.cause, caught.value.remedy
    assert "\n" not in cause + remedy
    return cause, remedy


def two_classes(root, write_images, num=2, **arguments):
    """Folders a and b of grey images, and their pixels (2 num, size, size)."""
    return np.concatenate([write_images(root / name, num, seed=seed, **arguments) for seed, name in enumerate("ab")])


def test_classes_and_files_in_sorted_order(tmp_path, write_images):
    # More than one thread reads at a time.
    dogs = write_images(tmp_path / "dog", 60, seed=1, size=2)
    cats = write_images(tmp_path / "cat", 90, seed=2, size=2)
    loaded = load_folder(tmp_path)
    assert (loaded.name, loaded.classes) == (tmp_path.name, ("cat", "dog"))
    assert loaded.labels.tolist() == [0] * 90 + [1] * 60
    assert np.array_equal(loaded.images[:, 0], np.concatenate([cats, dogs]))
    assert (loaded.num_train, loaded.num_val, loaded.num_test) == (150, 0, 0)


def test_hidden_and_other_files_are_left_out_and_files_without_an_ending_told_by_their_content(
    tmp_path, write_images, caplog
):
    pixels = two_classes(tmp_path, write_images, 3)
    write_images(tmp_path / ".cache", 3)
    (tmp_path / "README.md").write_text("not a class")
    for file in ("._00.png", "Thumbs.db", "0.txt", "1.txt"):
        (tmp_path / "a" / file).write_bytes(b"not an image")
    (tmp_path / "a" / "README").write_text("BM, P5 and GIF are formats")
    (tmp_path / "a" / "01.png").rename(tmp_path / "a" / "IMG_01")
    (tmp_path / "a" / "02.png").rename(tmp_path / "a" / "02.PNG")
    (tmp_path / "a" / "deep").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "a" / "deep" / "x.Bmp")
    loaded = load_folder(tmp_path)
    assert loaded.classes == ("a", "b")
    assert np.array_equal(loaded.images[:, 0], pixels[[0, 2, 1, 0, 3, 4, 5]])
    assert "3 files are left out" in caplog.text
    assert "2 .txt, 1 without an ending" in caplog.text


def test_linked_folders_are_followed_once_and_a_class_named_train_is_a_class(tmp_path, write_images):
    write_images(tmp_path / "data" / "cat", 3)
    write_images(tmp_path / "elsewhere", 4)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "train")
    os.symlink(tmp_path / "data" / "cat", tmp_path / "data" / "cat" / "again")
    loaded = load_folder(tmp_path / "data")
    assert (loaded.classes, loaded.labels.tolist()) == (("cat", "train"), [0, 0, 0, 1, 1, 1, 1])


def test_links_to_a_folder_above_are_not_followed(tmp_path, write_images):
    for name, num in (("data/cat", 3), ("data/dog", 4), ("elsewhere/ant", 5)):
        write_images(tmp_path / name, num)
    os.symlink("..", tmp_path / "data" / "cat" / "all")
    (tmp_path / "data" / "dog" / "deep").mkdir()
    os.symlink("../../..", tmp_path / "data" / "dog" / "deep" / "all")
    # A class that is linked lies in two places.
    os.symlink(tmp_path / "elsewhere" / "ant", tmp_path / "data" / "ant")
    os.symlink("..", tmp_path / "elsewhere" / "ant" / "all")
    os.symlink(tmp_path / "data", tmp_path / "elsewhere" / "ant" / "data")
    os.symlink(".", tmp_path / "data" / "everything")
    loaded = load_folder(tmp_path / "data")
    assert loaded.classes == ("ant", "cat", "dog")
    assert np.bincount(loaded.labels).tolist() == [5, 3, 4]


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"])
def test_what_drives_and_systems_leave_behind_is_passed_over(tmp_path, write_images, caplog, name):
    pixels = two_classes(tmp_path, write_images)
    for place in (tmp_path / name, tmp_path / "a" / name / "below"):
        write_images(place)
    loaded = load_folder(tmp_path)
    assert loaded.classes == ("a", "b")
    assert np.array_equal(loaded.images[:, 0], pixels)
    assert not caplog.records


@pytest.mark.parametrize("locked", ["", "c", "a/inner"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, write_images, monkeypatch, locked):
    for name in ("a/inner", "b", "c"):
        write_images(tmp_path / name, 3)

    # By hand, since the rights of a folder do not bind root.
    def guarded(listed, path):
        if str(path) == str(tmp_path / locked):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, functools.partial(guarded, getattr(os, name)))
    cause, remedy = refusal(tmp_path)
    assert cause == f"{tmp_path / locked} cannot be listed (Permission denied)."
    assert "readable" in remedy


def test_grey_colour_and_alpha(tmp_path, write_images):
    two_classes(tmp_path, write_images)
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "b" / "alpha.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).save(tmp_path / "b" / "deep.png")
    grey = load_folder(tmp_path)
    assert grey.images.shape == (6, 1, 8, 8)
    assert (grey.images[4] == 255).all()
    assert np.array_equal(grey.images[5, 0].ravel(), np.rint(np.arange(64) * 1040 * 255 / 65535))
    assert grey.deep_bits == 16
    Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(tmp_path / "a" / "colour.png")
    colour = load_folder(tmp_path)
    assert colour.images.shape == (7, 3, 8, 8)
    assert colour.images[2, :, 0, 0].tolist() == [255, 204, 204]
    assert np.array_equal(colour.images[[0, 1, 3, 4, 5, 6]], np.repeat(grey.images, 3, axis=1))


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, write_images):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heif")
    two_classes(tmp_path, write_images, size=64)
    colour = np.full((64, 64, 3), (200, 30, 60), dtype=np.uint8)
    pillow_heif.from_pillow(Image.fromarray(colour)).save(tmp_path / "a" / "IMG_1.HEIC", quality=95)
    loaded = load_folder(tmp_path).images
    assert np.abs(loaded[2].transpose(1, 2, 0).astype(int) - colour).max() <= 6


def test_corrupt_images_are_named_or_left_out_on_request(tmp_path, write_images, caplog):
    pixels = two_classes(tmp_path, write_images, 3)
    heic, truncated, nothing = (tmp_path / "a" / name for name in ("IMG_1.HEIC", "truncated.jpg", "zero.png"))
    heic.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-60])
    nothing.write_bytes(b"")
    cause, remedy = refusal(tmp_path)
    assert all(part in cause for part in ("3 of 9 images cannot be read: ", str(heic), str(truncated), str(nothing)))
    assert "--skip-bad-images" in remedy
    dicom = heic.rename(heic.with_suffix(".dcm"))
    assert "Repair" in refusal(tmp_path)[1]
    loaded = load_folder(tmp_path, skip_bad_images=True)
    assert "3 of 9 images cannot be read" in caplog.text
    assert loaded.skipped == (str(dicom), str(truncated), str(nothing))
    assert np.array_equal(loaded.images[:, 0], pixels)
    assert loaded.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"")
    assert refusal(tmp_path, skip_bad_images=True)[0] == f"Class 'b' of {tmp_path} has no readable images."


def test_a_picture_that_pillow_finds_too_large_is_to_be_scaled_down(tmp_path, write_images, monkeypatch):
    two_classes(tmp_path, write_images)
    Image.new("L", (30, 30)).save(tmp_path / "b" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    remedy = "Scale it down below 178 million pixels"
    assert refusal(tmp_path)[1] == f"{remedy}, or leave such files out with --skip-bad-images."
    with pytest.raises(UserError, match=remedy):
        read_image(tmp_path / "b" / "large.png", num_channels=1, image_size=8)


def test_sizes(tmp_path, write_images, caplog):
    pixels = two_classes(tmp_path, write_images, 9)
    assert np.array_equal(load_folder(tmp_path).images[:, 0], pixels)
    assert not caplog.records
    Image.new("L", (30, 10), 7).save(tmp_path / "b" / "wide.png")
    mixed = load_folder(tmp_path).images
    assert np.array_equal(mixed[:18, 0], pixels)
    assert (mixed[18] == 7).all()
    assert "1 of 19 pictures become 8x8 (1 of 30x10)" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        *("train Valid test", "TRAINING VALIDATION test-images", "Train-Data val2017 testset"),
        *("TrainData ValidationData TestData", "TrainingImages dev TestingImages", "TrainSplit evalset TestSplit"),
        *("TrainingSet validationset TestingSet", "trn val tst", "Trainingsdaten Validierungsdaten Testdaten"),
        *("entrenamiento validación prueba", "traindata valdata testdata", "训练集 验证集 测试集"),
        unicodedata.normalize("NFD", "entraînement validation holdout"),
    ],
)
def test_split_folders_by_any_of_their_names(tmp_path, write_images, names):
    train, val, test = names.split()
    parts = {f"{train}/a": 4, f"{train}/b": 3, f"{val}/a": 2, f"{val}/b": 1, f"{test}/a": 1, f"{test}/b": 2}
    pixels = [write_images(tmp_path / part, num, seed=num) for part, num in parts.items()]
    loaded = load_folder(tmp_path)
    assert np.array_equal(loaded.images[:, 0], np.concatenate(pixels))
    assert loaded.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1]
    assert (loaded.num_train, loaded.num_val, loaded.num_test) == (7, 3, 3)


ORDINARY = "train/a train/b test/a test/b"


@pytest.mark.parametrize(
    ("folders", "cause", "remedy"),
    [
        ("", "{} has no class folders", "named after the class"),
        ("a", "{} has the one class 'a'", "at least two classes"),
        ("photos/cat photos/dog", "the single folder photos, whose folders 'cat', 'dog'", "{}/photos"),
        ("set/train/a set/test/a", "'test', 'train' seem to be the splits", "--data {}/set"),
        ("train/x/a train/x/b test/x/a", "folder x, whose folders 'a', 'b'", "up into {}/train"),
        ("val/a val/b test/a test/b", "test/ with class folders, but no train/", "Add train/"),
        ("train test", "are splits that hold no class folders", "one folder a class"),
        ("cat/train cat/test dog/train", "{}/cat holds the splits", "{}/test/cat"),
        ("my_train_x/a my_train_x/b rest/a rest/b", "look like splits", "train, val and test"),
        ("traindir/a traindir/b testdir/a testdir/b", "look like splits", "train, val and test"),
        ("TestData/a TestData/b", "TestData/ with class folders, but no train/", "Add train/"),
        ("train/a train/b extra/a", "has extra/ beside train/, which holds class", "move extra/ away"),
        ("train/a train/b val/a validation/a", "both val/ and validation/ for one", "one of them"),
        (f"{ORDINARY} test/c", "Class 'c' of {}/test is not in {}/train", "same class folders"),
        (f"{ORDINARY} train/d", "Class 'd' of {}/train is not in {}/test", ""),
    ],
)
def test_folders_laid_out_otherwise_are_refused(tmp_path, write_images, folders, cause, remedy):
    for folder in folders.split() or [""]:
        write_images(tmp_path / folder, 3)
    told = refusal(tmp_path)
    assert cause.replace("{}", str(tmp_path)) in told[0]
    assert remedy.replace("{}", str(tmp_path)) in told[1]


@pytest.mark.parametrize(
    "folders",
    [
        "test_tube beaker",
        "trainers/red trainers/blue boots/red boots/blue",
        "validation_stamp postmark",
        "dev test cat",
        "dev/x dev/y prod/x prod/z staging/w",
    ],
)
def test_classes_whose_names_sound_like_splits(tmp_path, write_images, folders):
    for folder in folders.split():
        write_images(tmp_path / folder, 3)
    assert load_folder(tmp_path).classes == tuple(sorted({folder.split("/")[0] for folder in folders.split()}))


def test_class_names_that_look_the_same_are_told(tmp_path, write_images, caplog):
    names = ["Cat", "cat", "dog", "café", unicodedata.normalize("NFD", "café")]
    for name in names:
        write_images(tmp_path / name, 3)
    if len(list(tmp_path.iterdir())) < len(names):
        pytest.skip("this file system takes such names for one")
    assert len(load_folder(tmp_path).classes) == 5
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith(r"The classes 'Cat', 'cat', 'cafe\u0301', 'caf\xe9' differ by capitals, spaces")


def test_equal_folders_in_every_class_and_images_beside_them_are_told(tmp_path, write_images, caplog):
    for folder in ("one/cat", "one/dog", "two/cat", "two/dog", ""):
        write_images(tmp_path / folder, 3)
    assert load_folder(tmp_path).classes == ("one", "two")
    assert "each holds folders named 'cat', 'dog'" in caplog.text
    assert f"3 images in {tmp_path} itself" in caplog.text


def test_what_holds_no_images(tmp_path, write_images):
    assert refusal(tmp_path / "nowhere")[0] == f"There is no folder {tmp_path / 'nowhere'}."
    (tmp_path / "data.zip").write_bytes(b"")
    assert refusal(tmp_path / "data.zip")[0] == f"{tmp_path / 'data.zip'} is a file."
    for name in "ab":
        (tmp_path / name).mkdir()
    assert refusal(tmp_path)[0] == f"{tmp_path} holds no images."
    write_images(tmp_path / "a", 3)
    assert refusal(tmp_path)[0] == f"Class 'b' of {tmp_path} has no readable images."
