"""Image sets of ../shared/data/images, and scikit-learn's digits, as tasks: disjoint subsets of classes and their rows.
Nothing here knows a model."""

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
    """Some classes of a set. The last `n_test` images of each class are for testing; `n_train` are drawn from the
    others, and each of those comes with so many distorted copies."""

    images: str
    classes: tuple[str, ...]
    n_train: int
    n_test: int
    copies: int


def dealt(images: str, sizes: Mapping[str, Sequence[int]], wanted: str) -> dict[str, tuple[str, ...]]:
    """The subsets of a role, once the classes of a set are shuffled and dealt out to all roles, in their order.

    sizes: how many subsets, and classes in each, by role, such as "source".
    """
    left = list(classes(images))
    random.Random(f"{images} classes").shuffle(left)
    if sum(n * size for n, size in sizes.values()) > len(left):
        raise SystemExit(f"{images} has {len(left)} classes: too few for {dict(sizes)}.")
    found = {}
    for role, (n, size) in sizes.items():
        for one in range(n):
            if role == wanted:
                found[f"{images}-{role}{one}"] = tuple(left[:size])
            left = left[size:]
    return found


def train_rows(task: Task, seed: int) -> Rows:
    """Rows to train on: a draw of its own for every seed."""
    drawn = random.Random(f"{task.images} {task.classes} {seed}")
    found: Rows = []
    for label, one in enumerate(task.classes):
        pool = images_of(task.images, one)[: -task.n_test]
        kept = pool[drawn.sample(range(len(pool)), min(task.n_train, len(pool)))]
        found += _rows(kept, label)
        for _ in range(task.copies):
            found += _rows(np.stack([distorted(image, drawn) for image in kept]), label)
    drawn.shuffle(found)
    return found


def test_rows(task: Task) -> Rows:
    """The rows to test on: the same for every run."""
    return [
        row
        for label, one in enumerate(task.classes)
        for row in _rows(images_of(task.images, one)[-task.n_test :], label)
    ]


def distorted(image: np.ndarray, drawn: random.Random) -> np.ndarray:
    """The image turned by up to 15°, and stretched and moved by up to 15 % and 3 pixels each way."""
    from PIL import Image

    angle = math.radians(drawn.uniform(-15, 15))
    wide, high = drawn.uniform(0.85, 1.15), drawn.uniform(0.85, 1.15)
    a, b, c, d = wide * math.cos(angle), wide * math.sin(angle), -high * math.sin(angle), high * math.cos(angle)
    # about the middle
    middle = (SIDE - 1) / 2
    x, y = (middle + drawn.uniform(-3, 3) for _ in range(2))
    numbers = (a, b, x - a * middle - b * middle, c, d, y - c * middle - d * middle)
    found = Image.fromarray(image).transform((SIDE, SIDE), Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR)
    return np.asarray(found, dtype=np.float32)


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    pixels = torch.from_numpy(np.stack([row["pixel_values"] for row in rows]))
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def _rows(images: np.ndarray, label: int) -> Rows:
    return [{"pixel_values": 2 * image[None] - 1, "labels": label} for image in images]


def classes(images: str) -> tuple[str, ...]:
    """The names of a set's classes, sorted."""
    return tuple(sorted(_drawings() if images == "omniglot" else _by_label(images)))


@functools.cache
def images_of(images: str, name: str) -> np.ndarray:
    """All images of a class, (n, 28, 28) from 0, the ground, to 1, the ink."""
    if images != "omniglot":
        return _by_label(images)[name]
    return np.stack([_drawing(archive, file) for archive, file in sorted(_drawings()[name])])


@functools.cache
def _by_label(images: str) -> dict[str, np.ndarray]:
    if images == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels, labels = np.stack([_resized(one / 16) for one in found.images]), found.target
    else:
        pixels = _idx(IMAGES / images / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE) / np.float32(255)
        labels = _idx(IMAGES / images / "t10k-labels-idx1-ubyte.gz", 8)
    return {str(one): pixels[labels == one] for one in np.unique(labels)}


def _idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


@functools.cache
def _drawings() -> dict[str, list[tuple[Path, str]]]:
    """Character → its drawings, in the order of those who drew them. Two alphabets are in both archives, once here."""
    found: dict[str, dict[str, Path]] = {}
    for archive in sorted((IMAGES / "omniglot").glob("*.zip")):
        for file in zipfile.ZipFile(archive).namelist():
            folder, *place = file.split("/")
            if file.endswith(".png") and folder.startswith("images_background"):
                found.setdefault("/".join(place[:2]), {})[place[2]] = archive
    return {
        character: [(archive, f"{archive.stem}/{character}/{file}") for file, archive in sorted(files.items())]
        for character, files in found.items()
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
    found: np.ndarray = small / max(small.max(), 1e-6)
    return found


def _resized(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    way = Image.Resampling.BOX if image.shape[0] > SIDE else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((SIDE, SIDE), way), dtype=np.float32)
