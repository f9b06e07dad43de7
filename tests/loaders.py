"""The ways by which a saved adapter gets onto the tiny BERT: PEFT's, and transformers' own."""

from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification

LOADERS = ["peft", "low_cpu", "auto_peft", "native", "auto_model"]


def base(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def several(folder, base, names):
    """PEFT's model with these adapters, each in `folder(name)`."""
    first, *others = names
    model = PeftModel.from_pretrained(base, folder(first), adapter_name=first)
    for name in others:
        model.load_adapter(folder(name), adapter_name=name)
    return model.eval()


def load(loader, base_folder, adapter):
    if loader == "peft":
        return PeftModel.from_pretrained(base(base_folder), adapter)
    if loader == "low_cpu":
        return PeftModel.from_pretrained(base(base_folder), adapter, low_cpu_mem_usage=True)
    if loader == "auto_peft":
        return AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=3)
    if loader == "auto_model":
        return AutoModelForSequenceClassification.from_pretrained(adapter, num_labels=3)
    model = base(base_folder)
    model.load_adapter(str(adapter))
    return model
