"""A GLUE task on coefficients, with the recipe of the EigenLoRAx paper's scripts (arXiv 2502.04700, Table 2).

    pip install ".[train]" datasets
    eigenlorax fit loras-of-other-glue-tasks/ -o pack/ --n-components 32 --weighting factors
    python examples/glue.py pack/ mrpc --model FacebookAI/roberta-base

The recipe: query and value of RoBERTa-base, k = 32, r = 8, weight decay 0.1, 6 % of warm-up, batches of 64, learning
rate and epochs by task. Fit the pack on LoRAs of the other tasks, without the task itself. Rows come from GLUE on the
Hub, or from `--data`, a folder that `datasets` saved with the same columns. Evaluation is on the validation split after
the last epoch; nothing is chosen on it.
"""

import argparse
import tempfile

import numpy as np
from datasets import load_dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import eigenlorax as ex

COLUMNS = {
    "cola": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
}
RATES = {"cola": 4e-3, "mrpc": 4e-3, "qnli": 4e-3, "rte": 5e-3, "sst2": 5e-3, "stsb": 4e-3}
EPOCHS = {"cola": 80, "mrpc": 30, "qnli": 25, "rte": 80, "sst2": 60, "stsb": 40}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", help="a pack of LoRAs of other tasks")
    parser.add_argument("task", choices=COLUMNS)
    parser.add_argument("--model", default="FacebookAI/roberta-base", help="(default: %(default)s)")
    parser.add_argument("--data", help="a folder of the task's rows, with the splits train and validation")
    parser.add_argument("--method", choices=["coefficients", "core", "lora"], default="coefficients")
    parser.add_argument("--epochs", type=float, help="(default: the recipe's)")
    parser.add_argument(
        "--learning-rate", type=float, help="(default: the recipe's; about a tenth is better for a LoRA)"
    )
    parser.add_argument("--max-length", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def metric(task):
    """Return the metric of GLUE: correlation for CoLA (Matthews) and STS-B (Pearson), accuracy for the others."""

    def measure(predictions):
        scores, labels = predictions
        if task == "stsb":
            return {"pearson": float(np.corrcoef(scores.squeeze(-1), labels)[0, 1])}
        found = scores.argmax(-1)
        if task == "cola":
            return {"matthews": float(np.nan_to_num(np.corrcoef(found, labels)[0, 1]))}
        return {"accuracy": float((found == labels).mean())}

    return measure


def main():
    options = arguments()
    set_seed(options.seed)
    first, second = COLUMNS[options.task]
    rows = load_from_disk(options.data) if options.data else load_dataset("nyu-mll/glue", options.task)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(batch):
        texts = (batch[first], batch[second]) if second else (batch[first],)
        return tokenizer(*texts, truncation=True, max_length=options.max_length)

    rows = rows.map(encode, batched=True)
    n_labels = 1 if options.task == "stsb" else len(set(rows["train"]["label"]))
    config = {
        "coefficients": lambda: ex.EigenLoraxConfig(subspace=options.pack, r=8, task_type="SEQ_CLS"),
        "core": lambda: ex.EigenLoraxConfig(subspace=options.pack, core=True, task_type="SEQ_CLS"),
        "lora": lambda: LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"),
    }[options.method]()
    base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=n_labels)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            learning_rate=options.learning_rate or RATES[options.task],
            num_train_epochs=options.epochs or EPOCHS[options.task],
            per_device_train_batch_size=64,
            weight_decay=0.1,
            warmup_steps=0.06,
            seed=options.seed,
            save_strategy="no",
            report_to=[],
        )
        trainer = Trainer(
            model,
            training,
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            processing_class=tokenizer,
            compute_metrics=metric(options.task),
        )
        trainer.train()
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
