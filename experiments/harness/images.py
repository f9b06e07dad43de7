"""Image sets of ../shared/data/images, and scikit-learn's digits, as tasks: disjoint subsets of classes."""

import functools
import gzip
import io
import math
import random
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import record

Rows = list[dict[str, Any]]

IMAGES = record.ROOT.parent / "shared" / "data" / "images"
SIDE = 28


@dataclass(frozen=True, slots=True)
class Task:
    """Some classes of a set.

    n_test: number of images of each class for testing, the last ones. n_train: number of images of each class that are
    drawn from the others. copies: number of distorted copies of each of these.
    """

    images: str
    classes: tuple[str, ...]
    n_train: int
    n_test: int
    copies: int


def dealt(images: str, sizes: Mapping[str, Sequence[int]], wanted_role: str) -> dict[str, tuple[str, ...]]:
    """Deal the shuffled classes of a set out to all roles, in their order, and return the subsets of one role.

    sizes: number of subsets, and of classes in each, by role, such as "source".
    """
    left = list(classes(images))
    random.Random(f"{images} classes").shuffle(left)
    if sum(n * size for n, size in sizes.values()) > len(left):
        raise SystemExit(f"{images} has {len(left)} classes: too few for {dict(sizes)}.")
    subsets = {}
    for role, (n, size) in sizes.items():
        for index in range(n):
            if role == wanted_role:
                subsets[f"{images}-{role}{index}"] = tuple(left[:size])
            left = left[size:]
    return subsets


def train_rows(task: Task, seed: int) -> Rows:
    """Return the training rows, a draw of its own for each seed."""
    drawn = random.Random(f"{task.images} {task.classes} {seed}")
    rows: Rows = []
    for label, name in enumerate(task.classes):
        pool = images_of(task.images, name)[: -task.n_test]
        drawn_images = pool[drawn.sample(range(len(pool)), min(task.n_train, len(pool)))]
        rows += _rows(drawn_images, label)
        for _ in range(task.copies):
            rows += _rows(np.stack([distorted(image, drawn) for image in drawn_images]), label)
    drawn.shuffle(rows)
    return rows


def test_rows(task: Task) -> Rows:
    """Return the test rows, the same for every run."""
    return [
        row
        for label, name in enumerate(task.classes)
        for row in _rows(images_of(task.images, name)[-task.n_test :], label)
    ]


def distorted(image: np.ndarray, drawn: random.Random) -> np.ndarray:
    """Rotate the image by up to 15°, scale it by up to 15 % and move it by up to 3 pixels in each direction."""
    from PIL import Image

    angle = math.radians(drawn.uniform(-15, 15))
    wide, high = drawn.uniform(0.85, 1.15), drawn.uniform(0.85, 1.15)
    a, b, c, d = wide * math.cos(angle), wide * math.sin(angle), -high * math.sin(angle), high * math.cos(angle)
    # the map is about the middle
    middle = (SIDE - 1) / 2
    x, y = (middle + drawn.uniform(-3, 3) for _ in range(2))
    numbers = (a, b, x - a * middle - b * middle, c, d, y - c * middle - d * middle)
    size, affine, bilinear = (SIDE, SIDE), Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).transform(size, affine, numbers, bilinear), dtype=np.float32)


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    pixels = torch.from_numpy(np.stack([row["pixel_values"] for row in rows]))
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def _rows(images: np.ndarray, label: int) -> Rows:
    return [{"pixel_values": 2 * image[None] - 1, "labels": label} for image in images]


def classes(images: str) -> tuple[str, ...]:
    """Return the names of a set's classes, sorted."""
    return tuple(sorted(_drawings() if images == "omniglot" else _by_label(images)))


@functools.cache
def images_of(images: str, name: str) -> np.ndarray:
    """Return all images of a class, (n, 28, 28) from 0, the ground, to 1, the ink."""
    if images != "omniglot":
        return _by_label(images)[name]
    return np.stack([_drawing(archive, file) for archive, file in sorted(_drawings()[name])])


@functools.cache
def _by_label(images: str) -> dict[str, np.ndarray]:
    if images == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels, labels = np.stack([_resized(image / 16) for image in digits.images]), digits.target
    else:
        pixels = _idx(IMAGES / images / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE) / np.float32(255)
        labels = _idx(IMAGES / images / "t10k-labels-idx1-ubyte.gz", 8)
    return {str(label): pixels[labels == label] for label in np.unique(labels)}


def _idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


@functools.cache
def _drawings() -> dict[str, list[tuple[Path, str]]]:
    """Return the drawings of each character, in the order of their authors. Two alphabets are in both archives."""
    archives: dict[str, dict[str, Path]] = {}
    for archive in sorted((IMAGES / "omniglot").glob("*.zip")):
        for file in zipfile.ZipFile(archive).namelist():
            folder, *parts = file.split("/")
            if file.endswith(".png") and folder.startswith("images_background"):
                archives.setdefault("/".join(parts[:2]), {})[parts[2]] = archive
    return {
        character: [(archive, f"{archive.stem}/{character}/{file}") for file, archive in sorted(files.items())]
        for character, files in archives.items()
    }


@functools.cache
def _archive(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _drawing(archive: Path, file: str) -> np.ndarray:
    from PIL import Image

    # black on white, one bit deep
    ink = 1 - np.asarray(Image.open(io.BytesIO(_archive(archive).read(file))), dtype=np.float32)
    small = _resized(ink)
    # a stroke two pixels wide is grey after shrinking
    rescaled: np.ndarray = small / max(small.max(), 1e-6)
    return rescaled


def _resized(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    resampling = Image.Resampling.BOX if image.shape[0] > SIDE else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((SIDE, SIDE), resampling), dtype=np.float32)
