import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    Image.fromarray(np.full((8, 8), 257 * 30, dtype=np.uint16)).save(tmp_path / "b" / "deep.png")
    grey = load_folder(tmp_path)
    assert grey.images.shape == (6, 1, 8, 8)
    assert (grey.images[4] == 255).all()
    assert (grey.images[5] == 30).all()
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
    assert mixed.shape == (5, 1, 64, 64)
    assert (mixed[4] == 7).all()
    assert load_folder(tmp_path, image_size=10).images.shape == (5, 1, 10, 10)


def test_large_squares_become_64(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "a", 1, size=80)
    write_images(tmp_path / "b", 1, size=80)
    assert load_folder(tmp_path).images.shape == (2, 1, 64, 64)
    assert load_folder(tmp_path, image_size=80).images.shape == (2, 1, 80, 80)


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
