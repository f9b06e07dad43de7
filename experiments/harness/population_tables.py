"""Tables of the experiment on populations: what users gain over a common adapter, and in how many bytes."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from . import record
from .pages import table
from .records import Json

POPULATIONS = {"populations-raters": "sst5", "populations-writers": "mnist"}
REFERENCE = "common"
"""The method that gains are counted from."""
LABELS = {
    "common": "common adapter",
    "head": "common adapter, own head",
    "own": "**own LoRA, from the common adapter**",
    "scratch": "own LoRA, from scratch",
    "coefficients": "coefficients, r = 8, k = 32",
}
DRAWS = 1000


def blocks() -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the page, by their names."""
    return {block: partial(population_table, name) for block, name in POPULATIONS.items()}


def population_table(name: str) -> str:
    """Write the table of one population."""
    measured = record.read(record.RESULTS / "populations.json")
    population = measured["populations"][name]
    methods = population["methods"]
    coded = sorted((method for method in methods if method not in LABELS), key=coded_order)
    rows = [
        [
            LABELS.get(method) or coded_label(method),
            f"{user_bytes(population, method):,.0f}",
            f"{100 * np.mean(methods[method]['accuracy']):.1f}",
            "–" if method == REFERENCE else gain(methods, method),
            "–" if method in (REFERENCE, "own", "scratch") else share(methods, method),
            f"{np.mean(methods[method]['loss']):.3f}",
            f"{np.mean(methods[method]['error']):.2f}" if "error" in methods[method] else "–",
        ]
        for method in [*(label for label in LABELS if label in methods), *coded]
    ]
    header = (
        "",
        "bytes of a user",
        "accuracy",
        "gain",
        "share of the LoRA's gain, %",
        "cross-entropy",
        "error of the difference",
    )
    return f"{table(header, rows)}\n\n{caption(measured, population)}"


def caption(measured: Json, population: Json) -> str:
    """Return what the columns are, how large the shared parts are, and the command."""
    rows, held_out, numbers = population["train_rows"], population["held_out_rows"], population["numbers"]
    information = measured["meta_info"]["package_info"]
    n_few = min(len(method["accuracy"]) for method in population["methods"].values())
    few = f"From scratch: the first {n_few} users. " if n_few < len(rows) else ""
    return (
        f"{len(rows)} users with {min(rows)} to {max(rows)} rows (mean {np.mean(rows):.0f}), "
        f"{np.mean(held_out):.0f} held-out rows each. Gains in points over the common adapter, user by "
        f"user, ± the standard error over users. {few}Bytes: head included; in 16 bits a number where nothing is "
        "coded. Shared by all users and not counted there: the common adapter, "
        f"{2 * numbers['lora'] / 1000:.0f} kB in 16 bits{bases_size(population)}. "
        f"Norm of the difference ÷ norm of the common update: {np.mean(population['difference_norm']):.2f}. "
        f"`{measured['run_info']['command']}`; torch {information['torch-version']}, "
        f"transformers {information['transformers-version']}, peft {information['peft-version']}."
    )


def bases_size(population: Json) -> str:
    """Write how large the bases of other users are, if there are any."""
    sizes = [method["bases_bytes"] for name, method in population["methods"].items() if name.endswith("-bases")]
    if not sizes:
        return ""
    return (
        f"; bases of 30 other users, {2 * population['numbers']['pack'] / 1000:.0f} kB in 16 bits for coefficients, "
        f"{min(sizes) / 1000:.0f} to {max(sizes) / 1000:.0f} kB coded"
    )


def coded_order(method: str) -> tuple[bool, int]:
    """Return the key that lists users alone first, and the largest budgets first."""
    return method.endswith("-bases"), -int(method.split("-")[1])


def coded_label(method: str) -> str:
    """Return the name of a coding in the table."""
    kilobytes = f"{int(method.split('-')[1]) // 1000} kB"
    return f"difference, {kilobytes}" + (", over others' bases" if method.endswith("-bases") else "")


def user_bytes(population: Json, method: str) -> float:
    """Return the mean bytes of a user, head included; without what all users share."""
    coded, numbers = population["methods"][method], population["numbers"]
    if "update_bytes" in coded:
        return float(np.mean(coded["update_bytes"]) + np.mean(coded["head_bytes"]))
    head = 2 * numbers["head"]
    lora = 2 * numbers["lora"] + head
    coefficients = 2 * numbers.get("coefficients", 0) + head
    sizes = {"common": 0, "head": head, "own": lora, "scratch": lora, "coefficients": coefficients}
    return float(sizes[method])


def gains(methods: Json, method: str, n_users: int | None = None) -> np.ndarray:
    """Return the gains of the users of a method over the common adapter, in points. n_users: the first ones only."""
    accuracies = np.array(methods[method]["accuracy"][:n_users])
    gained: np.ndarray = 100 * (accuracies - methods[REFERENCE]["accuracy"][: len(accuracies)])
    return gained


def gain(methods: Json, method: str) -> str:
    """Write the mean gain over the common adapter and its standard error, in points."""
    users = gains(methods, method)
    return f"{users.mean():+.2f} ± {users.std(ddof=1) / len(users) ** 0.5:.2f}"


def share(methods: Json, method: str) -> str:
    """Write the share of the own LoRAs' mean gain, and its standard error over draws of users, in per cent."""
    users = gains(methods, method)
    own = gains(methods, "own", len(users))
    draws = np.random.default_rng(0).integers(len(own), size=(DRAWS, len(own)))
    drawn = users[draws].mean(1) / own[draws].mean(1)
    return f"{100 * users.mean() / own.mean():.1f} ± {100 * drawn.std(ddof=1):.1f}"
