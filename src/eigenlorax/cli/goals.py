"""Table of goals in `eigenlorax --help` and in the documentation: their commands, and their costs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """One row of the table of goals.

    Attributes:
        purpose: Goal of the user.
        commands: Commands for it, in this order.
        cost: Costs and limits.
    """

    purpose: str
    commands: tuple[str, ...]
    cost: str


GOALS = (
    Goal(
        "Make a collection small",
        ("eigenlorax fit adapters/ -o pack/",),
        "Every adapter in the pack stays within an error of 0.1, related or not. Not for training, unless --basis 32 "
        "adds a basis. vLLM's shared basis serves only the adapters that this basis represents well, often none.",
    ),
    Goal(
        "Train new tasks on coefficients",
        (
            "eigenlorax fit adapters/ -o pack/ --for training",
            "eigenlorax train pack/ --task TASK --train ROWS -o new/",
        ),
        "Far fewer trained parameters than a LoRA, often lower accuracy. Adapters in the pack are exact only as far as "
        "they share a subspace.",
    ),
    Goal(
        "Serve many adapters from one model",
        ("eigenlorax fit adapters/ -o pack/ --for serving", "eigenlorax serve-check pack/ --model MODEL"),
        "One basis in memory keeps every adapter within an error of 0.1. It is large where adapters share little. "
        "Without a shared basis, vLLM and AdapterBank take packs of every kind.",
    ),
    Goal(
        "See whether adapters share a subspace",
        ("eigenlorax report pack/ -a adapters/ -o report.html",),
        "Needs the original adapters. Measures a sample of the modules of a large collection (`--full`: all).",
    ),
    Goal(
        "Keep every checkpoint of a training",
        ("eigenlorax track run/ -o history/", "eigenlorax log history/"),
        "Each version stays within an error of 0.05 of its own checkpoint, heads within 0.1, or bit for bit with "
        "--lossless. The optimizer's state is not kept.",
    ),
    Goal(
        "Get ordinary LoRAs back",
        ("eigenlorax export pack/ -o loras/",),
        "For PEFT, vLLM, diffusers and web UIs. The files are as large as the originals were.",
    ),
)
