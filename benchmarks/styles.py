"""A pack's styles in a pipeline beside as many LoRAs: bytes for real models' shapes, seconds on a narrow one.

    python benchmarks/styles.py                  # the table of bytes, of docs/diffusion.md
    python benchmarks/styles.py --seconds 50     # seconds to load 50 styles, and to switch, on SDXL's layers, narrow
    python benchmarks/styles.py --precision      # what half precision does to the update of a layer

Bytes are arithmetic on shapes: models are made on the meta device, and have no weights.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from markdown_table import table
from torch import nn

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors

SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Stable Diffusion 1.5, unet": lambda: UNet2DConditionModel(**SD1),
    "Stable Diffusion XL, unet": lambda: UNet2DConditionModel(**XL),
    "FLUX.1, transformer": lambda: FluxTransformer2DModel(guidance_embeds=True),
}
COUNTS = (14, 50)


@dataclass(frozen=True)
class Held:
    """Bytes that styles take in a model. loras: of as many LoRAs. cores: what is active, one a layer, in float32."""

    loras: int
    bases: int
    coefficients: int
    cores: int

    @property
    def total(self) -> int:
        return self.bases + self.coefficients + self.cores


def held(shapes: Sequence[tuple[int, int]], styles: int, rank: int, k: int, itemsize: int) -> Held:
    """For layers of these shapes (out, in), k components a side, and numbers of so many bytes."""
    sides = [(min(k, n_in), min(k, n_out), n_in, n_out) for n_out, n_in in shapes]
    return Held(
        loras=styles * rank * sum(n_in + n_out for _, _, n_in, n_out in sides) * itemsize,
        bases=sum(k_down * n_in + k_up * n_out for k_down, k_up, n_in, n_out in sides) * itemsize,
        coefficients=styles * rank * sum(k_down + k_up for k_down, k_up, _, _ in sides) * itemsize,
        cores=4 * sum(k_down * k_up for k_down, k_up, _, _ in sides),
    )


def attention(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of attention, which most styles are on."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".attn" in name and "norm" not in name
    }


def bytes_table(rank: int = 16, k: int = 64) -> str:
    """In MB, float16."""
    rows = []
    for name, make in MODELS.items():
        with torch.device("meta"):
            shapes = [tuple(layer.weight.shape) for layer in attention(make()).values()]
        for count in COUNTS:
            found = held(shapes, count, rank, k, itemsize=2)
            sizes = (found.loras, found.bases, found.coefficients, found.cores, found.total)
            rows.append([name, str(len(shapes)), str(count), *(f"{size / 1e6:,.0f}" for size in sizes)])
    return table(["MB", "layers", "styles", "as LoRAs", "basis", "coefficients", "cores", "as a pack, all"], rows)


def seconds(count: int, rank: int = 4, k: int = 8) -> None:
    """Seconds for `count` styles by `load_into`, and for one at a time by diffusers' own loader."""
    narrow = {**XL, "block_out_channels": (8, 16, 32), "cross_attention_dim": 24, "attention_head_dim": 4}

    def make() -> UNet2DConditionModel:
        return UNet2DConditionModel(sample_size=8, norm_num_groups=4, **narrow).eval()

    unet, random = make(), torch.Generator().manual_seed(0)
    styles = [
        ex.from_factors(
            f"style{number}",
            {
                f"unet.{name}": LoRAFactors(
                    torch.randn(rank, layer.in_features, generator=random),
                    torch.randn(layer.out_features, rank, generator=random),
                    scaling=1.0,
                )
                for name, layer in attention(unet).items()
            },
        )
        for number in range(count)
    ]
    pack = ex.fit(styles, n_components=k, sweeps=0, warn_above=1.0)
    took = {"load_into": timed(lambda: ex.load_into(unet, pack))}
    took["switching to two of them"] = timed(lambda: unet.set_adapters(["style0", "style1"], [0.7, 0.5]))
    plain = make()
    for number, style in enumerate(styles):
        state = {}
        for module, factors in style.modules.items():
            state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = factors.down, factors.up
        took[f"LoRA {number + 1}"] = timed(
            lambda state=state, style=style: plain.load_lora_adapter(state, prefix="unet", adapter_name=style.name)
        )
    took["switching to two LoRAs"] = timed(lambda: plain.set_adapters(["style0", "style1"], [0.7, 0.5]))
    print(f"{count} styles on {len(attention(unet))} layers, float32, CPU, {torch.get_num_threads()} threads")
    for what, value in took.items():
        print(f"{what}: {value:.2f} s")


def precision_table(rank: int = 16, k: int = 64, width: int = 1280, tokens: int = 256) -> str:
    """The error of a layer's update in half precision, relative to float64's: of a LoRA, and of the same as a pack of k
    components, in both dtypes of the bases. The output that it is added to is left away, which rounds more."""
    random = torch.Generator().manual_seed(0)
    styles = {
        f"style{number}": LoRAFactors(
            torch.randn(rank, width, generator=random) / width**0.5, torch.randn(width, rank, generator=random), 1.0
        )
        for number in range(k // rank)
    }
    pack = ex.fit([ex.from_factors(name, {"layer": one}) for name, one in styles.items()], energy=1.0)
    given, style = torch.randn(tokens, width, generator=random), styles["style1"]
    exact = given.double() @ style.down.double().mT @ style.up.double().mT
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs, errors = given.to(dtype), []
        lora = inputs @ style.down.to(dtype).mT @ style.up.to(dtype).mT
        errors.append(lora)
        for of_bases in (None, torch.float32):
            model = nn.Sequential()
            model.add_module("layer", nn.Linear(width, width, bias=False))
            nn.init.zeros_(model.layer.weight)
            model.to(dtype)
            ex.load_into(model, pack, "style1", dtype=of_bases)
            with torch.no_grad():
                errors.append(model(inputs))
        relative = [float((one.double() - exact).norm() / exact.norm()) for one in errors]
        rows.append([str(dtype).removeprefix("torch."), *(f"{one:.1e}" for one in relative)])
    return table(["", "LoRA", "pack, bases in that dtype", "pack, bases in float32"], rows)


def timed(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    with warnings.catch_warnings():
        # PEFT's, that there are several adapters
        warnings.simplefilter("ignore", UserWarning)
        call()
    return time.perf_counter() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, metavar="N", help="load N styles, and say how long that takes")
    parser.add_argument("--precision", action="store_true", help="what half precision does to a layer's update")
    given = parser.parse_args()
    if given.seconds:
        seconds(given.seconds)
    elif given.precision:
        print(precision_table())
    else:
        print(bytes_table())
