"""Simulated users of two data sets: raters of sentences, and writers of digits.

Rows that the common adapter is trained on, rows of the users who tune and fit, and rows of test users are disjoint.
"""

import functools
import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import images, record, text, vit

Rows = list[dict[str, Any]]
WORK = record.ROOT / "experiments" / "work" / "populations"


@dataclass(frozen=True, slots=True)
class User:
    """Rows of one user.

    Attributes:
        name: Role and number, such as "test-17".
        train: Rows to train on, with distorted copies of images.
        held_out: Rows to count answers on.
        n_rows: Number of training rows without copies.
    """

    name: str
    train: Rows
    held_out: Rows
    n_rows: int

    @property
    def seed(self) -> int:
        """Seed of the batches of this user."""
        return random.Random(self.name).randrange(2**31)


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of a population's models and trainings.

    Attributes:
        scratch_users: Number of test users whose LoRA is trained from scratch, too: the first ones.
        has_bases: Bases of other users are fitted, for codings and coefficients.
        target_modules: Names of the modules with an adapter.
        n_labels: Number of labels of a user's head.
        steps, batch_size: Steps of every training of a user, and rows of a step.
        common_steps, common_batch_size, common_rate: The same of the common adapter, and its learning rate.
        head_rate: Learning rate of heads beside an adapter.
        in_half: Frozen matrices are bfloat16.
    """

    scratch_users: int
    has_bases: bool
    target_modules: tuple[str, str]
    n_labels: int
    steps: int
    batch_size: int
    common_steps: int
    common_batch_size: int
    common_rate: float
    head_rate: float
    in_half: bool


class Population(Protocol):
    """One data set as users."""

    name: str
    settings: Settings

    def new_base(self, n_labels: int) -> Any:
        """Load the base model with a head of so many labels."""

    def collate(self, rows: Rows) -> dict[str, Tensor]:
        """Return a batch."""

    def common_rows(self) -> Rows:
        """Return the pooled rows of other users."""

    def user(self, role: str, index: int) -> User:
        """Return a user. role: "tuning", "fit" or "test"."""


class Reviews:
    """Sentences of sst5, rated 0 to 4. A user reads four of eight topics, and recommends a sentence from a rating on:
    a lenient one in two favourite topics, a strict one in two others."""

    name = "sst5"
    settings = Settings(
        scratch_users=25,
        has_bases=False,
        target_modules=("query", "value"),
        n_labels=2,
        steps=24,
        batch_size=16,
        common_steps=400,
        common_batch_size=32,
        common_rate=3e-3,
        head_rate=1e-2,
        in_half=True,
    )
    n_topics = 8
    common_users, rows_of_common_user = 150, 60
    held_out_rows = 200
    max_length = 32
    # rows of the shuffled training and test splits, by role
    train_spans: ClassVar = {
        "common": slice(0, 3000),
        "tuning": slice(3000, 4000),
        "fit": slice(3000, 4000),
        "test": slice(4000, 6000),
    }
    held_out_spans: ClassVar = {"tuning": slice(0, 600), "fit": slice(0, 600), "test": slice(600, 2000)}

    def new_base(self, n_labels: int) -> Any:
        return text.new_base("sst2", {"dropout": 0.0})

    def collate(self, rows: Rows) -> dict[str, Tensor]:
        return dict(
            text.collate()([{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows])
        )

    @functools.cached_property
    def _rows(self) -> dict[str, Rows]:
        """The shuffled splits, encoded, with the topic of each row."""
        splits = {split: list(text.rows_of("sst5", split)) for split in ("train", "test")}
        for split, rows in splits.items():
            random.Random(f"sst5 {split}").shuffle(rows)
        encoded = {split: text.encoded(rows, self.max_length) for split, rows in splits.items()}
        topics = self._topics(encoded["train"] + encoded["test"])
        for row, topic in zip(encoded["train"] + encoded["test"], topics, strict=True):
            row["topic"], row["rating"] = topic, row["labels"]
        return encoded

    def _topics(self, rows: Rows) -> list[int]:
        """Cluster the base model's mean-pooled embeddings, without looking at ratings."""
        from sklearn.cluster import KMeans

        path = WORK / self.name / "embeddings.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"embeddings": self._embeddings(rows)}, path)
        embeddings = load_file(path)["embeddings"].numpy()
        return KMeans(self.n_topics, n_init=3, random_state=0).fit_predict(embeddings).tolist()

    @torch.inference_mode()
    def _embeddings(self, rows: Rows) -> Tensor:
        encoder = self.new_base(2).bert.eval()
        by_length = sorted(range(len(rows)), key=lambda n: text.length(rows[n]))
        embeddings = torch.zeros(len(rows), encoder.config.hidden_size)
        for start in range(0, len(rows), 64):
            indices = by_length[start : start + 64]
            batch = self.collate([rows[n] for n in indices])
            batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                hidden = encoder(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            embeddings[indices] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
        return embeddings

    def common_rows(self) -> Rows:
        pool = self._rows["train"][self.train_spans["common"]]
        return [
            row
            for index in range(self.common_users)
            for row in self._drawn(pool, self._taste("common", index), self.rows_of_common_user, f"common {index}")
        ]

    def user(self, role: str, index: int) -> User:
        taste, drawn = self._taste(role, index), random.Random(f"sst5 {role} {index} rows")
        n_rows = drawn.randint(50, 200)
        train = self._drawn(self._rows["train"][self.train_spans[role]], taste, n_rows, f"{role} {index} train")
        held_out = self._drawn(
            self._rows["test"][self.held_out_spans[role]], taste, self.held_out_rows, f"{role} {index} test"
        )
        return User(f"{role}-{index}", train, sorted(held_out, key=text.length), len(train))

    def _taste(self, role: str, index: int) -> dict[int, int]:
        """Return the lowest recommended rating by topic, for the topics that a user reads."""
        drawn = random.Random(f"sst5 {role} {index} taste")
        topics = drawn.sample(range(self.n_topics), 4)
        lenient = drawn.choice([1, 2, 3])
        strict = drawn.choice([rating for rating in (2, 3, 4) if rating >= lenient])
        return {topic: lenient if place < 2 else strict for place, topic in enumerate(topics)}

    def _drawn(self, pool: Rows, taste: dict[int, int], n: int, seed: str) -> Rows:
        """Draw rows of the user's topics, with his labels."""
        rows = [row for row in pool if row["topic"] in taste]
        rows = random.Random(f"sst5 {seed}").sample(rows, min(n, len(rows)))
        return [{**row, "labels": int(row["rating"] >= taste[row["topic"]])} for row in rows]


class Writers:
    """Digits of MNIST. A writer holds the paper at an angle of his own, may write mirrored or with a thick pen, and has
    a slant and a size: 6 and 9 are told apart by knowing him. The base has seen small upright digits."""

    name = "mnist"
    settings = Settings(
        scratch_users=100,
        has_bases=True,
        target_modules=("q_proj", "v_proj"),
        n_labels=10,
        steps=40,
        batch_size=16,
        common_steps=900,
        common_batch_size=64,
        common_rate=5e-3,
        head_rate=1e-2,
        in_half=False,
    )
    common_users, rows_of_common_user = 150, 60
    held_out_rows = 300
    # images of the shuffled set, by role
    train_spans: ClassVar = {
        "common": slice(0, 3500),
        "tuning": slice(3500, 5000),
        "fit": slice(3500, 5000),
        "test": slice(5000, 7500),
    }
    held_out_spans: ClassVar = {"tuning": slice(7500, 8200), "fit": slice(7500, 8200), "test": slice(8200, 10000)}

    def new_base(self, n_labels: int) -> Any:
        return vit.new_base(n_labels)

    def collate(self, rows: Rows) -> dict[str, Tensor]:
        return images.collate(rows)

    @functools.cached_property
    def _digits(self) -> list[tuple[np.ndarray, int]]:
        digits = [(image, int(name)) for name in images.classes("mnist") for image in images.images_of("mnist", name)]
        random.Random("mnist writers").shuffle(digits)
        return digits

    def common_rows(self) -> Rows:
        return [
            row
            for index in range(self.common_users)
            for row in self._written("common", index, self.train_spans["common"], self.rows_of_common_user)
        ]

    def user(self, role: str, index: int) -> User:
        n_rows = random.Random(f"mnist {role} {index} rows").randint(50, 200)
        train = self._written(role, index, self.train_spans[role], n_rows)
        held_out = self._written(role, index, self.held_out_spans[role], self.held_out_rows)
        return User(f"{role}-{index}", train, held_out, n_rows)

    def _written(self, role: str, index: int, span: slice, n: int) -> Rows:
        """Draw digits, as this user writes them."""
        hand = Hand.of(random.Random(f"mnist {role} {index}"))
        drawn = random.Random(f"mnist {role} {index} {span}").sample(self._digits[span], n)
        return [{"pixel_values": 2 * hand.write(image)[None] - 1, "labels": label} for image, label in drawn]


@dataclass(frozen=True, slots=True)
class Hand:
    """How a writer's digits differ from upright ones.

    Attributes:
        angle: Angle of the paper, in radians.
        slant: Shear along the lines.
        size: Scale.
        is_mirrored, is_thick: Whether he writes from right to left, and with a thick pen.
    """

    angle: float
    slant: float
    size: float
    is_mirrored: bool
    is_thick: bool

    @classmethod
    def of(cls, drawn: random.Random) -> "Hand":
        """Draw a hand."""
        return cls(
            drawn.uniform(0, 2 * math.pi),
            drawn.uniform(-0.4, 0.4),
            drawn.uniform(0.8, 1.1),
            drawn.random() < 0.5,
            drawn.random() < 0.5,
        )

    def write(self, image: np.ndarray) -> np.ndarray:
        """Return an upright digit, (28, 28) from 0 to 1, in this hand."""
        from PIL import Image, ImageFilter

        mirror = -1 if self.is_mirrored else 1
        turn = np.array([[math.cos(self.angle), math.sin(self.angle)], [-math.sin(self.angle), math.cos(self.angle)]])
        # PIL asks from where in the old image a point of the new one is taken; centres of pixels are at halves
        source = np.array([[mirror, self.slant], [0.0, 1.0]]) @ turn / self.size
        middle = images.SIDE / 2
        offset = middle - source @ [middle, middle]
        numbers = (*source[0], offset[0], *source[1], offset[1])
        picture = Image.fromarray(np.round(255 * image).astype(np.uint8))
        if self.is_thick:
            picture = picture.filter(ImageFilter.MaxFilter(3))
        size = images.SIDE, images.SIDE
        turned = picture.transform(size, Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR)
        return np.asarray(turned, dtype=np.float32) / np.float32(255)


POPULATIONS: tuple[Population, ...] = (Writers(), Reviews())
