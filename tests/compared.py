"""Adapters of classifiers, and what they predict by hand: one text at a time, in float64, updates in the weights."""

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
import tiny
from eigenlorax.core.adapter import from_factors
from planted import normal, random_factors


def made(name, classes, seed, base, **config):
    """A classifier whose head PEFT keeps beside the model's own, as it writes it."""
    modules = {
        module: random_factors(tiny.RANK, tiny.IN, tiny.IN, seed=seed + place, dtype=torch.float32, size=0.4)
        for place, module in enumerate(tiny.BERT)
    }
    heads = {
        "base_model.model.classifier.weight": normal(classes, tiny.IN, seed=seed + 50, dtype=torch.float32),
        "base_model.model.classifier.bias": normal(classes, seed=seed + 51, dtype=torch.float32),
    }
    whole = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": str(base),
        "r": tiny.RANK,
        "lora_alpha": 2.0 * tiny.RANK,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
    }
    return from_factors(name, modules, heads=heads, base_model=str(base), source_config=json.dumps({**whole, **config}))


def dense(model, adapter):
    """The model with an adapter's update added to its weights, in float64."""
    for module, factors in adapter.modules.items() if adapter else ():
        weight = model.get_submodule(module).weight
        delta = factors.scaling * factors.up.double() @ factors.down.double()
        # GPT-2's layers have their weights the other way round
        weight.data += delta if type(model.get_submodule(module)).__name__ == "Linear" else delta.mT
    return model.eval()


def classes_by_hand(base, heads, adapter, texts):
    """Log-probabilities of each text, one at a time."""
    weight = heads["base_model.model.classifier.weight"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(weight)).double()
    model.classifier.weight.data = weight.double()
    model.classifier.bias.data = heads["base_model.model.classifier.bias"].double()
    dense(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    said = [model(**tokenizer(*text, return_tensors="pt")).logits[0].detach() for text in texts]
    return torch.stack(said).log_softmax(dim=1)


def share(one, other):
    return float((one == other).double().mean())


def divergence(p, q):
    return float((p.exp() * (p - q)).sum(dim=1).mean())


def trained(folder, base, **options):
    """An adapter as PEFT saves it, none of its numbers what it began with."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        config = LoraConfig(task_type="SEQ_CLS", r=tiny.RANK, target_modules=["query", "value"], **options)
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return ex.read_adapter(folder, name="one")
