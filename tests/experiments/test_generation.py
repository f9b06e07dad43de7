"""The generation task of the experiments: prompts and answers, and what counts as an answer."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eigenlorax.train.examples import IGNORED

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from harness import generation, language  # noqa: E402

pytestmark = pytest.mark.slow

VOCABULARY = 128


@pytest.fixture
def letters(monkeypatch):
    """A tokenizer of one token a character."""
    monkeypatch.setattr(language, "tokenizer", lambda: lambda text: {"input_ids": list(text.encode())})


def text_of(ids):
    return bytes(ids).decode()


def test_the_answer_alone_is_predicted(letters):
    rows = [{"text": "who", "label": 1}, {"text": "a long question", "label": 0}]
    first, second = generation.encoded(rows, ["LOC", "HUM"], max_length=6)
    assert text_of(first["input_ids"]) == "who\nAnswer: HUM\n"
    assert text_of(second["input_ids"]) == "a long\nAnswer: LOC\n"
    answer = [token for token in first["labels"] if token != IGNORED]
    assert text_of(answer) == " HUM\n"
    assert first["labels"][-len(answer) :] == answer


def test_a_row_matches_where_greedy_decoding_writes_its_answer(letters):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
    prompts = [list(text.encode()) for text in ("who", "when was it", "where to")]
    rows = []
    for n, prompt in enumerate(prompts):
        written = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
        if n == 1:
            written[2] = (written[2] + 1) % VOCABULARY
        rows.append({"input_ids": prompt + written, "labels": [IGNORED] * len(prompt) + written})
    batch = generation.collate(rows)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert generation.matches(logits, batch["labels"]).tolist() == [1.0, 0.0, 1.0]
