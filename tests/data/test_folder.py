import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from dnas_ens.data.folder import load_folder
from dnas_ens.errors import UserError


def cause_and_remedy(root: Path, **arguments: object) -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        load_folder(root, **arguments)
    cause, remedy = caught.value.cause, caught.value.remedy
    assert "\n" not in cause + remedy
    return cause, remedy


def test_classes_and_files_in_sorted_order(tmp_path: Path, write_images) -> None:
    dogs = write_images(tmp_path / "dog", 4, seed=1)
    cats = write_images(tmp_path / "cat", 3, seed=2)
    loaded = load_folder(tmp_path)
    assert loaded.name == tmp_path.name
    assert loaded.classes == ("cat", "dog")
    assert loaded.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert loaded.images.dtype == np.uint8
    assert np.array_equal(loaded.images[:, 0], np.concatenate([cats, dogs]))
    assert (loaded.num_train, loaded.num_val, loaded.num_test) == (7, 0, 0)
    assert loaded.flip
    assert loaded.skipped == ()


def test_more_files_than_one_thread_reads_at_a_time(tmp_path: Path, write_images) -> None:
    cats = write_images(tmp_path / "cat", 90, seed=1, size=2)
    dogs = write_images(tmp_path / "dog", 60, seed=2, size=2)
    assert np.array_equal(load_folder(tmp_path).images[:, 0], np.concatenate([cats, dogs]))


def test_hidden_and_other_files_are_ignored_and_extensions_are_of_any_case(
    tmp_path: Path, write_images
) -> None:
    pixels = write_images(tmp_path / "cat", 3, seed=1)
    write_images(tmp_path / "dog", 3, seed=2)
    write_images(tmp_path / ".cache", 3)
    (tmp_path / "README.md").write_text("not a class")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._00.png").write_bytes(b"not an image")
    (tmp_path / "cat" / "02.png").rename(tmp_path / "cat" / "02.PNG")
    (tmp_path / "cat" / "deep").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "cat" / "deep" / "x.Bmp")
    loaded = load_folder(tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert loaded.labels.tolist() == [0] * 4 + [1] * 3
    assert np.array_equal(loaded.images[:4, 0], pixels[[0, 1, 2, 0]])


def test_linked_folders_are_followed_once(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "data" / "cat", 3)
    write_images(tmp_path / "elsewhere", 4)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "dog")
    os.symlink(tmp_path / "data" / "cat", tmp_path / "data" / "cat" / "again")
    assert load_folder(tmp_path / "data").labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_train_val_test_layout(tmp_path: Path, write_images) -> None:
    pixels = [
        write_images(tmp_path / part / name, num, seed=seed)
        for seed, (part, name, num) in enumerate(
            [
                ("train", "a", 4),
                ("train", "b", 3),
                ("Valid", "a", 2),
                ("Valid", "b", 1),
                ("test", "a", 1),
                ("test", "b", 2),
            ]
        )
    ]
    loaded = load_folder(tmp_path)
    assert np.array_equal(loaded.images[:, 0], np.concatenate(pixels))
    assert loaded.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1]
    assert (loaded.num_train, loaded.num_val, loaded.num_test) == (7, 3, 3)


def test_a_class_named_train_is_a_class(tmp_path: Path, write_images) -> None:
    for name in ("bus", "train"):
        write_images(tmp_path / name, 3)
    assert load_folder(tmp_path).classes == ("bus", "train")


def test_grey_colour_and_alpha(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "a", 2)
    write_images(tmp_path / "b", 2)
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


def test_jpeg_files_are_as_pillow_reads_them(tmp_path: Path) -> None:
    expected = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(len(expected)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = tmp_path / name / "photo.JPEG"
        Image.fromarray(pixels).save(path, quality=75)
        with Image.open(path) as image:
            expected.append(np.asarray(image).transpose(2, 0, 1))
    assert np.array_equal(load_folder(tmp_path).images, np.stack(expected))


def test_sizes(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "a", 2, size=8)
    write_images(tmp_path / "b", 2, size=8)
    assert load_folder(tmp_path).images.shape[-1] == 8
    assert load_folder(tmp_path, image_size=6).images.shape == (4, 1, 6, 6)
    Image.new("L", (30, 10), 7).save(tmp_path / "b" / "wide.png")
    mixed = load_folder(tmp_path).images
    assert mixed.shape == (5, 1, 8, 8)
    assert (mixed[4] == 7).all()
    assert load_folder(tmp_path, image_size=10).images.shape == (5, 1, 10, 10)


def test_large_squares_become_64(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "a", 1, size=80)
    write_images(tmp_path / "b", 1, size=80)
    assert load_folder(tmp_path).images.shape == (2, 1, 64, 64)
    assert load_folder(tmp_path, image_size=80).images.shape == (2, 1, 80, 80)


def test_one_odd_file_leaves_the_others_as_they_are(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = write_images(tmp_path / "a", 9, size=32)
    write_images(tmp_path / "b", 9, size=32)
    assert not caplog.records
    Image.new("L", (33, 32)).save(tmp_path / "b" / "odd.png")
    loaded = load_folder(tmp_path)
    assert np.array_equal(loaded.images[:9, 0], pixels)
    assert "1 of 19 pictures become 32x32 (1 of 33x32)" in caplog.text


def test_12_bit_greys_keep_their_levels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = []
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for index in range(4):
            values = np.random.default_rng([seed, index]).integers(0, 4096, (16, 16)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{index}.png")
            expected.append(np.rint(values.astype(np.float64) * 255 / 4095))
    loaded = load_folder(tmp_path)
    assert np.array_equal(loaded.images[:, 0], np.stack(expected))
    assert loaded.deep_bits == 12
    assert "8 pictures of 8" in caplog.text


def test_files_without_an_ending_are_told_by_their_content(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = write_images(tmp_path / "a", 3)
    write_images(tmp_path / "b", 3)
    (tmp_path / "a" / "02.png").rename(tmp_path / "a" / "IMG_02")
    (tmp_path / "a" / "README").write_text("BM, P5 and GIF are formats")
    for index in range(4):
        (tmp_path / "b" / f"{index}.txt").write_text("a caption")
    loaded = load_folder(tmp_path)
    assert np.array_equal(loaded.images[:3, 0], pixels)
    assert len(loaded.images) == 6
    assert "5 files are left out" in caplog.text
    assert "4 .txt, 1 without an ending" in caplog.text


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_as_pillow_reads_it(tmp_path: Path, write_images) -> None:
    for name in "ab":
        write_images(tmp_path / name, 2, size=16)
    photo = tmp_path / "a" / "photo.AVIF"
    Image.new("RGB", (16, 16), (200, 30, 60)).save(photo, "AVIF")
    with Image.open(photo) as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(load_folder(tmp_path).images[2], expected)


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path, write_images) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heif")
    for name in "ab":
        write_images(tmp_path / name, 2, size=64)
    colour = np.full((64, 64, 3), (200, 30, 60), dtype=np.uint8)
    pillow_heif.from_pillow(Image.fromarray(colour)).save(tmp_path / "a" / "IMG_1.HEIC", quality=95)
    loaded = load_folder(tmp_path).images
    assert np.abs(loaded[2].transpose(1, 2, 0).astype(int) - colour).max() <= 6


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_1.heif", "DSC_1.NEF", "scan.dcm", "drawing.svg"])
def test_pictures_that_cannot_be_read_are_counted_and_named(tmp_path: Path, write_images, name: str) -> None:
    for folder in "ab":
        write_images(tmp_path / folder, 3)
    (tmp_path / "a" / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    cause, remedy = cause_and_remedy(tmp_path)
    assert cause.startswith("1 of 7 images cannot be read: ")
    assert str(tmp_path / "a" / name) in cause
    assert "--skip-bad-images" in remedy
    assert load_folder(tmp_path, skip_bad_images=True).skipped == (str(tmp_path / "a" / name),)


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN", "training_set", "Train Data"])
@pytest.mark.parametrize("val", ["val", "Valid", "VALIDATION", "val2017"])
@pytest.mark.parametrize("test", ["test", "Testing", "test-images"])
def test_split_folders_by_any_of_their_names(
    tmp_path: Path, write_images, train: str, val: str, test: str
) -> None:
    for number, part in enumerate((train, val, test), start=1):
        for name in ("glioma", "healthy"):
            write_images(tmp_path / part / name, number, seed=number)
    loaded = load_folder(tmp_path)
    assert loaded.classes == ("glioma", "healthy")
    assert (loaded.num_train, loaded.num_val, loaded.num_test) == (2, 4, 6)


@pytest.mark.parametrize(
    ("folders", "cause", "remedy"),
    [
        (
            ["photos/cat", "photos/dog"],
            "holds the single folder photos, whose folders 'cat', 'dog'",
            "{}/photos",
        ),
        (["set/train/a", "set/test/a"], "'test', 'train' seem to be the splits", "--data {}/set"),
        (
            ["train/x/a", "train/x/b", "test/x/a"],
            "single folder x, whose folders 'a', 'b'",
            "up into {}/train",
        ),
        (["val/a", "val/b", "test/a", "test/b"], "test/ with class folders, but no train/", "Add train/"),
        (["train", "test"], "are splits that hold no class folders", "one folder a class"),
        (["cat/train", "cat/test", "dog/train"], "{}/cat holds the splits", "{}/test/cat"),
        (["my_train_x/a", "my_train_x/b", "rest/a", "rest/b"], "look like splits", "train, val and test"),
    ],
)
def test_folders_at_the_wrong_level(
    tmp_path: Path, write_images, folders: list[str], cause: str, remedy: str
) -> None:
    for folder in folders:
        write_images(tmp_path / folder, 3)
    told = cause_and_remedy(tmp_path)
    assert cause.format(tmp_path) in told[0]
    assert remedy.format(tmp_path) in told[1]


def test_equal_folders_in_every_class_and_images_beside_them_are_told(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("one/cat", "one/dog", "two/cat", "two/dog"):
        write_images(tmp_path / folder, 2)
    write_images(tmp_path, 3)
    assert load_folder(tmp_path).classes == ("one", "two")
    assert "each holds folders named 'cat', 'dog'" in caplog.text
    assert f"3 images that lie in {tmp_path} itself" in caplog.text


def test_missing_folder(tmp_path: Path) -> None:
    cause, remedy = cause_and_remedy(tmp_path / "nowhere")
    assert cause == f"There is no folder {tmp_path / 'nowhere'}."
    assert "--data" in remedy


def test_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"")
    cause, remedy = cause_and_remedy(tmp_path / "data.zip")
    assert cause == f"{tmp_path / 'data.zip'} is a file."
    assert "one folder of images a class" in remedy


def test_images_without_class_folders(tmp_path: Path, write_images) -> None:
    write_images(tmp_path, 3)
    cause, remedy = cause_and_remedy(tmp_path)
    assert cause == f"{tmp_path} has no class folders."
    assert "named after the class" in remedy


def test_no_images_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    cause, remedy = cause_and_remedy(tmp_path)
    assert cause == f"{tmp_path} holds no images."
    assert ".png" in remedy


def test_empty_class_is_named(tmp_path: Path, write_images) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, 3)
    (tmp_path / "test" / "b" / "readme.txt").write_text("")
    for path in (tmp_path / "test" / "b").glob("*.png"):
        path.unlink()
    cause, remedy = cause_and_remedy(tmp_path)
    assert cause == f"Class 'b' of {tmp_path / 'test'} has no readable images."
    assert "remove the folder" in remedy


def test_one_class_only(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "a", 3)
    cause, remedy = cause_and_remedy(tmp_path)
    assert cause == f"{tmp_path} has the one class 'a'."
    assert "at least two classes" in remedy


def test_classes_that_differ_between_parts(tmp_path: Path, write_images) -> None:
    for path in ("train/a", "train/b", "test/a", "test/b", "test/c"):
        write_images(tmp_path / path, 3)
    cause, remedy = cause_and_remedy(tmp_path)
    assert cause == f"Class 'c' of {tmp_path / 'test'} is not in {tmp_path / 'train'}."
    assert "same class folders" in remedy
    write_images(tmp_path / "train/c", 3)
    write_images(tmp_path / "train/d", 3)
    assert (
        cause_and_remedy(tmp_path)[0] == f"Class 'd' of {tmp_path / 'train'} is not in {tmp_path / 'test'}."
    )


def test_other_folders_beside_train(tmp_path: Path, write_images) -> None:
    for path in ("train/a", "train/b", "extra/a"):
        write_images(tmp_path / path, 3)
    cause, remedy = cause_and_remedy(tmp_path)
    assert cause == f"{tmp_path} has extra/ beside train/, which holds class folders."
    assert "move extra/ away" in remedy


def test_two_folders_for_one_split(tmp_path: Path, write_images) -> None:
    for path in ("train/a", "train/b", "val/a", "validation/a"):
        write_images(tmp_path / path, 3)
    assert cause_and_remedy(tmp_path)[0] == f"{tmp_path} has both val/ and validation/ for one split."


def spoil(folder: Path) -> list[Path]:
    """One truncated JPEG, one file that is no image."""
    truncated, nothing = folder / "truncated.jpg", folder / "zero.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-60])
    nothing.write_bytes(b"")
    return [truncated, nothing]


def test_corrupt_images_are_named_and_counted(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "a", 3)
    write_images(tmp_path / "b", 3)
    truncated, nothing = spoil(tmp_path / "a")
    cause, remedy = cause_and_remedy(tmp_path)
    assert cause.startswith("2 of 8 images cannot be read: ")
    assert str(truncated) in cause
    assert str(nothing) in cause
    assert "--skip-bad-images" in remedy


def test_corrupt_images_left_out_on_request(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = write_images(tmp_path / "a", 3, seed=1), write_images(tmp_path / "b", 3, seed=2)
    bad = spoil(tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        loaded = load_folder(tmp_path, skip_bad_images=True)
    assert "2 of 8 images cannot be read" in caplog.text
    assert loaded.skipped == tuple(map(str, bad))
    assert np.array_equal(loaded.images[:, 0], np.concatenate([a, b]))
    assert loaded.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"")
    assert (
        cause_and_remedy(tmp_path, skip_bad_images=True)[0]
        == f"Class 'b' of {tmp_path} has no readable images."
    )
