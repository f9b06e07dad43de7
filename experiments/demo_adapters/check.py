"""Reads the shipped adapters back through PEFT: test rows, the demo's own sentences, how alike their A matrices are.

Trains nothing and writes nothing.
"""

import argparse
from itertools import combinations
from pathlib import Path

import torch
import transformers
from collection import SPECS
from safetensors.torch import load_file
from torch import Tensor, nn
from train import DATA, DEMO_DATA, accuracy, encode, read_json, read_labels, read_rows, reload


def downs(name: str) -> dict[str, Tensor]:
    """The lora_A of every module, flattened."""
    tensors = load_file(DEMO_DATA / "adapters" / name / "adapter_model.safetensors")
    return {key: tensor.float().flatten() for key, tensor in tensors.items() if "lora_A" in key}


def largest_cosine(names: list[str]) -> float:
    """Largest |cosine| over modules and pairs; near 1 only where two adapters share their random start."""
    found = {name: downs(name) for name in names}
    pairs = combinations(names, 2)
    return max(
        abs(nn.functional.cosine_similarity(found[a][key], found[b][key], dim=0).item())
        for a, b in pairs
        for key in found[a]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with a folder a task")
    parser.add_argument("--rows", type=int, default=300, help="test rows an adapter, from the first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sentences = read_json(DEMO_DATA / "sentences.json")
    for spec in SPECS:
        model = reload(spec.name, len(read_labels(options.data, spec.task)))
        test = encode(read_rows(options.data / spec.task / "test.jsonl")[: options.rows])
        own = encode(sentences[spec.task])
        print(spec.name, "test", accuracy(model, test), "sentences", accuracy(model, own), flush=True)
    print(f"largest |cosine| of lora_A between two adapters: {largest_cosine([spec.name for spec in SPECS]):.3f}")


if __name__ == "__main__":
    main()
