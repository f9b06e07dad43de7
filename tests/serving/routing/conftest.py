"""A tiny model with a tokenizer of words, and planted embeddings."""

import zlib

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[peft]'")

import tiny


class WordTokenizer:
    """One token per word; the same in all processes."""

    model_max_length = 12

    def __call__(self, texts, truncation, max_length):
        assert truncation
        ids = [[3 + zlib.crc32(word.encode()) % 50 for word in text.split()][:max_length] for text in texts]
        return {"input_ids": ids}


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.fixture
def model():
    return tiny.make_bert()


@pytest.fixture(scope="session")
def pack():
    return tiny.make_pack(dict.fromkeys(tiny.BERT, (tiny.IN, tiny.IN)))[0]


@pytest.fixture
def embed():
    """Embeddings by the first word of a text, a direction in the plane, with a little noise by the text."""
    angles = {"north": 90, "east": 0, "west": 180, "south": 270}

    def embeddings(texts):
        rows = []
        for text in texts:
            degrees = angles[text.split()[0]] + zlib.crc32(text.encode()) % 21 - 10
            angle = torch.deg2rad(torch.tensor(float(degrees)))
            rows.append(torch.stack([angle.cos(), angle.sin(), torch.tensor(0.1)]))
        return torch.stack(rows).numpy()

    return embeddings
