"""Reads the shipped adapters back through PEFT: test rows, the demo's own sentences, how alike their A and B are.

Trains nothing and writes nothing.
"""

import argparse
from itertools import combinations
from pathlib import Path

import torch
import transformers
from collection import ONE_SEED, OWN_SEEDS, Collection
from safetensors.torch import load_file
from torch import Tensor, nn
from train import DATA, DEMO_DATA, accuracy, adapters_of, encode, read_json, read_labels, read_rows, reload


def factors(folder: Path, kind: str) -> Tensor:
    """The lora_A, or lora_B, of all modules, one after the other."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensor.double().flatten() for key, tensor in sorted(tensors.items()) if kind in key])


def cosines(collection: Collection, kind: str) -> Tensor:
    """Of each pair of adapters; near 1 only where they share their random start."""
    found = {spec.name: factors(adapters_of(collection) / spec.name, kind) for spec in collection.specs}
    pairs = [nn.functional.cosine_similarity(found[a], found[b], dim=0) for a, b in combinations(found, 2)]
    return torch.stack(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with a folder a task")
    parser.add_argument("--rows", type=int, default=300, help="test rows an adapter, from the first")
    parser.add_argument("--one-seed", action="store_true", help="the adapters that share their random start")
    options = parser.parse_args()
    collection = ONE_SEED if options.one_seed else OWN_SEEDS
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sentences = read_json(DEMO_DATA / "sentences.json")
    for spec in collection.specs:
        model = reload(adapters_of(collection) / spec.name, len(read_labels(options.data, spec.task)))
        test = encode(read_rows(options.data / spec.task / "test.jsonl")[: options.rows])
        own = encode(sentences[spec.task])
        print(spec.name, "test", accuracy(model, test), "sentences", accuracy(model, own), flush=True)
    for kind in ("lora_A", "lora_B"):
        found = cosines(collection, kind)
        print(f"cosine of {kind} between two adapters: mean {found.mean():.4f}, {found.min():.4f} to {found.max():.4f}")


if __name__ == "__main__":
    main()
