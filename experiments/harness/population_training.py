"""Training and testing adapters of simulated users: LoRAs, heads, and coefficients beside a fixed common adapter."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import eigenlorax as ex
from eigenlorax.tuner.optim import SOAP, coefficient_groups

from .population_users import Population, Rows, User
from .text import in_half

RANK = 8
SCALING = 2.0
WARMUP = 0.1
EVALUATION_BATCH = 50

Factors = dict[str, tuple[Tensor, Tensor]]
"""Factors (down, up) of an update by module, scaling included in up."""


@dataclass(frozen=True, slots=True)
class Weights:
    """An adapter: its factors and its head.

    Attributes:
        factors: Factors by module.
        head: Weight and bias of the classifier side by side, (labels, d + 1).
    """

    factors: Factors
    head: Tensor

    def save(self, path: Path) -> None:
        """Write the adapter to a safetensors file."""
        tensors = {"head": self.head}
        for name, (down, up) in self.factors.items():
            tensors |= {f"{name}.down": down.contiguous(), f"{name}.up": up.contiguous()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> "Weights":
        """Read an adapter that `save` wrote."""
        tensors = load_file(path)
        names = [key.removesuffix(".down") for key in tensors if key.endswith(".down")]
        return cls({name: (tensors[f"{name}.down"], tensors[f"{name}.up"]) for name in names}, tensors["head"])


def added(left: Factors, right: Factors) -> Factors:
    """Return the sum of two updates."""
    return {
        name: (torch.cat([left[name][0], right[name][0]]), torch.cat([left[name][1], right[name][1]], 1))
        for name in left
    }


def difference(factors: Factors, reference: Factors) -> Factors:
    """Return an update minus another one."""
    return added(factors, {name: (down, -up) for name, (down, up) in reference.items()})


class LoRAModel:
    """A base model with a LoRA and a head, whose weights are replaced.

    Args:
        population: The data set.
        n_labels: Number of labels of the head.
        rank: Rank of the LoRA; updates of smaller rank are padded with zeros.
    """

    def __init__(self, population: Population, n_labels: int, rank: int = RANK) -> None:
        settings = population.settings
        config = LoraConfig(
            r=rank,
            lora_alpha=SCALING * rank,
            target_modules=list(settings.target_modules),
            modules_to_save=["classifier"],
        )
        self.population = population
        self.model = get_peft_model(population.new_base(n_labels), config)
        if settings.in_half:
            in_half(self.model)
        self.rank = rank
        self.layers = {
            name.removeprefix("base_model.model."): (module.lora_A["default"].weight, module.lora_B["default"].weight)
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A")
        }
        self.head = head_of(self.model)

    def new_weights(self, seed: int) -> Weights:
        """Return factors as PEFT initialises them, down random and up 0, and a head of zeros."""
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name, (down, up) in self.layers.items():
            bound = 1 / math.sqrt(down.shape[1])
            factors[name] = (2 * torch.rand(down.shape, generator=generator) - 1) * bound, torch.zeros(up.shape)
        weight, _ = self.head
        return Weights(factors, torch.zeros(weight.shape[0], weight.shape[1] + 1))

    @torch.no_grad()
    def set(self, weights: Weights) -> None:
        """Replace the factors and the head."""
        for name, (down, up) in self.layers.items():
            new_down, new_up = weights.factors[name]
            down.zero_()[: len(new_down)] = new_down
            up.zero_()[:, : new_up.shape[1]] = new_up / SCALING
        set_head(self.head, weights.head)

    def get(self) -> Weights:
        """Return a copy of the factors and the head."""
        factors = {name: (down.detach().clone(), SCALING * up.detach()) for name, (down, up) in self.layers.items()}
        weight, bias = self.head
        return Weights(factors, torch.cat([weight.detach(), bias.detach()[:, None]], 1))

    def train(self, start: Weights, rows: Rows, rate: float, seed: int, common: bool = False) -> Weights:
        """Train from a start by AdamW. common: for the steps of the common adapter."""
        self.set(start)
        settings = self.population.settings
        factors = [tensor for pair in self.layers.values() for tensor in pair]
        groups = [{"params": factors, "lr": rate}, {"params": list(self.head), "lr": settings.head_rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        sizes = (settings.common_steps, settings.common_batch_size) if common else (settings.steps, settings.batch_size)
        run_steps(self.model, optimizer, batches(self.population, rows, sizes, seed), sizes[0], settings.in_half)
        return self.get()


class CoefficientModel:
    """A base model with a fixed common update, and coefficients of differences to it over a pack's basis.

    Args:
        population: The data set.
        common: The common adapter.
        pack: Pack of differences of other users.
    """

    def __init__(self, population: Population, common: Weights, pack: ex.Pack) -> None:
        settings = population.settings
        base = population.new_base(settings.n_labels)
        modules = dict(base.named_modules())
        for name, (down, up) in common.factors.items():
            modules[name].register_forward_hook(update_hook(down, up))
        config = ex.EigenLoraxConfig(
            subspace=pack,
            r=RANK,
            lora_alpha=SCALING * RANK,
            target_modules=list(settings.target_modules),
            modules_to_save=["classifier"],
        )
        self.population = population
        self.model = get_peft_model(base, config)
        if settings.in_half:
            in_half(self.model)
        self.head = head_of(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.trained]

    def train(self, head: Tensor, rows: Rows, rate: float, seed: int) -> None:
        """Train from the common adapter by SOAP."""
        with torch.no_grad():
            for parameter, start in zip(self.trained, self.start, strict=True):
                parameter.copy_(start)
        set_head(self.head, head)
        settings = self.population.settings
        optimizer = SOAP(coefficient_groups(self.model, lr=rate, head_lr=settings.head_rate))
        sizes = settings.steps, settings.batch_size
        run_steps(self.model, optimizer, batches(self.population, rows, sizes, seed), sizes[0], settings.in_half)


def update_hook(down: Tensor, up: Tensor) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that adds an update to a linear layer."""

    def add_update(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + linear(linear(inputs[0], down), up).to(output.dtype)

    return add_update


def head_of(model: Any) -> tuple[Tensor, Tensor]:
    """Return the trained weight and bias of a PEFT model's classifier."""
    (weight,) = (
        p
        for name, p in model.named_parameters()
        if p.requires_grad and name.endswith("default.weight") and "classifier" in name
    )
    (bias,) = (
        p
        for name, p in model.named_parameters()
        if p.requires_grad and name.endswith("default.bias") and "classifier" in name
    )
    return weight, bias


@torch.no_grad()
def set_head(head: tuple[Tensor, Tensor], values: Tensor) -> None:
    """Replace a classifier by a weight and a bias side by side."""
    head[0].copy_(values[:, :-1])
    head[1].copy_(values[:, -1])


def batches(population: Population, rows: Rows, sizes: tuple[int, int], seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches. sizes: steps and rows of a batch; rows are drawn anew once all have been seen."""
    for indices in batch_indices(len(rows), sizes, seed):
        yield population.collate([rows[n] for n in indices])


def batch_indices(n_rows: int, sizes: tuple[int, int], seed: int) -> Iterator[list[int]]:
    """Yield the rows of each batch; arguments as in `batches`."""
    generator, left = torch.Generator().manual_seed(seed), []
    for _ in range(sizes[0]):
        while len(left) < sizes[1]:
            left += torch.randperm(n_rows, generator=generator).tolist()
        yield left[: sizes[1]]
        left = left[sizes[1] :]


def run_steps(model: Any, optimizer: Any, all_batches: Iterator[dict[str, Tensor]], steps: int, half: bool) -> None:
    """Train on batches, with a linear warm-up over a tenth of the steps and linear decay, gradients cut at norm 1."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(step, steps))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    for batch in all_batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def schedule_factor(step: int, steps: int) -> float:
    """Return the learning rate of a step relative to the largest."""
    warmup = max(round(WARMUP * steps), 1)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


@torch.inference_mode()
def logits(model: Any, population: Population, rows: Rows) -> Tensor:
    """Return the model's logits, (rows, labels)."""
    model.eval()
    outputs = []
    for start in range(0, len(rows), EVALUATION_BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=population.settings.in_half):
            batch = population.collate(rows[start : start + EVALUATION_BATCH])
            outputs.append(model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float())
    return torch.cat(outputs)


def scores(outputs: Tensor, rows: Rows) -> dict[str, float]:
    """Return accuracy and mean cross-entropy."""
    labels = torch.tensor([row["labels"] for row in rows])
    return {
        "accuracy": float((outputs.argmax(1) == labels).float().mean()),
        "loss": float(cross_entropy(outputs, labels)),
    }


def classifier_inputs(model: LoRAModel, rows: Rows) -> Tensor:
    """Return the inputs of the classifier, (rows, d)."""
    inputs: list[Tensor] = []
    classifier = next(module for name, module in model.model.named_modules() if name.endswith("classifier"))
    hook = classifier.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].float()))
    logits(model.model, model.population, rows)
    hook.remove()
    return torch.cat(inputs)


def train_head(model: LoRAModel, start: Weights, user: User, rate: float) -> Tensor:
    """Train a head alone on the features of an adapter, with as many steps as an adapter. Returns its logits."""
    model.set(start)
    # inference tensors cannot be used in a backward pass
    features, held_out = (classifier_inputs(model, rows).clone() for rows in (user.train, user.held_out))
    labels = torch.tensor([row["labels"] for row in user.train])
    head = torch.nn.Linear(features.shape[1], len(start.head))
    set_head((head.weight, head.bias), start.head)
    settings = model.population.settings
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(step, settings.steps))
    for indices in batch_indices(len(features), (settings.steps, settings.batch_size), user.seed):
        cross_entropy(head(features[indices]), labels[indices]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return head(held_out).detach()


def mean_accuracy(all_scores: list[dict[str, float]]) -> float:
    """Return the mean accuracy of several users."""
    return float(np.mean([score["accuracy"] for score in all_scores]))
