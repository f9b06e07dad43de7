"""The tables of `training_memory.json` in Markdown."""

from collections.abc import Iterable
from typing import Any

from markdown_table import table

Json = dict[str, Any]

MIB = 2**20
MODELS = {
    "minilm": "MiniLM, float32",
    "smollm2": "SmolLM2-135M, bfloat16",
    "llama": "two blocks of Llama-3.2-1B, bfloat16",
}
CHECKPOINTS = {False: "no", True: "yes"}


def markdown(result: Json) -> str:
    """Return the peak of training steps, what the model keeps for backward, and how it was measured."""
    where = result["environment"]
    return (
        "Peak of a training step in MiB beyond the frozen weights: activations, gradients, AdamW's state, the adapter "
        "and its bases (r = 8, k = 32). A batch is one row. *No adapter* is the frozen model with a gradient to its "
        "input.\n\n"
        f"{peaks(result['cases'])}\n\n"
        f"{variants(result['cases'])}"
        "Kept for backward without checkpoints, in MiB, by the part of the model that keeps it:\n\n"
        f"{parts(result['cases'])}\n\n"
        f"`{result['command']}`: bytes of PyTorch's allocator; {resident(result['cases'])} "
        f"{where['processor']}, one thread, torch {where['torch']}, peft {where['peft']}, transformers "
        f"{where['transformers']}, seed {result['seed']}."
    )


def peak(case: Json | None) -> int:
    """Return the bytes of a training step beyond the frozen weights; 0 if the case was not measured."""
    return case["allocated_peak"] + case["adapter"] + case["optimizer"] if case else 0


def peaks(cases: list[Json]) -> str:
    rows = []
    for model, targets, checkpointing, length in _settings(cases):
        lora, coefficients, none = (
            peak(_case(cases, model, length, targets if method != "none" else "all", method, checkpointing))
            for method in ("LoRA", "coefficients", "none")
        )
        if lora and coefficients:
            rows.append(
                [
                    MODELS[model],
                    targets,
                    CHECKPOINTS[checkpointing],
                    f"{length:,}",
                    f"{none / MIB:.0f}",
                    f"{lora / MIB:.0f}",
                    f"{coefficients / MIB:.0f}",
                    f"{coefficients / lora:.2f}",
                ]
            )
    return table(
        ("", "adapted", "checkpoints", "tokens", "no adapter", "LoRA", "coefficients", "÷ LoRA"),
        rows,
    )


def variants(cases: list[Json]) -> str:
    methods = ("LoRA", "LoRA in bfloat16", "coefficients", "core")
    rows = []
    for model, targets, checkpointing, length in _settings(cases):
        found = [peak(_case(cases, model, length, targets, method, checkpointing)) for method in methods]
        if length == 512 and found[-1]:
            figures = [f"{each / MIB:.0f}" if each else "–" for each in found]
            rows.append([MODELS[model], targets, CHECKPOINTS[checkpointing], *figures])
    if not rows:
        return ""
    header = ("", "adapted", "checkpoints", *methods)
    return f"The same with other kinds of adapters, 512 tokens:\n\n{table(header, rows)}\n\n"


def parts(cases: list[Json]) -> str:
    """Return what is kept for backward at the longest length of each model."""
    rows = []
    longest = {case["model"]: max(each["length"] for each in cases if each["model"] == case["model"]) for case in cases}
    for model, targets, checkpointing, length in _settings(cases):
        lora, coefficients = (
            _case(cases, model, length, targets, method, checkpointing) for method in ("LoRA", "coefficients")
        )
        if length != longest[model] or not lora or not coefficients or "saved" not in coefficients:
            continue
        saved = coefficients["saved"]
        own = [each["saved"]["adapter"] for each in (lora, coefficients)]
        rows.append(
            [
                MODELS[model],
                targets,
                f"{length:,}",
                *(f"{saved[part] / MIB:.0f}" for part in PARTS),
                *(f"{each / MIB:.1f}" for each in own),
                f"{sum(coefficients['saved'].values()) / sum(lora['saved'].values()):.2f}",
            ]
        )
    header = ("", "adapted", "tokens", *PARTS, "LoRA's own", "coefficients' own", "whole model ÷ LoRA")
    return table(header, rows)


PARTS = ("attention", "MLP", "norms", "dropout", "head and loss", "other")


def resident(cases: list[Json]) -> str:
    """Return how far resident memory is from the allocator's figure, where it was measured."""
    measured = [case for case in cases if "resident_peak" in case]
    ratios = [case["resident_peak"] / case["allocated_peak"] for case in measured]
    models = " and ".join(dict.fromkeys(MODELS[case["model"]].partition(",")[0] for case in measured))
    return (
        f"resident memory of {models} at 512 tokens, without checkpoints, is {min(ratios):.2f} to {max(ratios):.2f} of "
        "these."
    )


def _settings(cases: Iterable[Json]) -> list[tuple[str, str, bool, int]]:
    settings = {(case["model"], case["targets"], case["checkpointing"], case["length"]) for case in cases}
    return sorted(settings, key=lambda each: (list(MODELS).index(each[0]), each[1] == "all", *each[2:]))


def _case(
    cases: Iterable[Json], model: str, length: int, targets: str, method: str, checkpointing: bool
) -> Json | None:
    wanted = {"model": model, "length": length, "targets": targets, "method": method, "checkpointing": checkpointing}
    return next((case for case in cases if all(case[field] == setting for field, setting in wanted.items())), None)
