"""Tables of vLLM with many adapters, by `multi_lora.py`: tokens a second, and bytes of slots."""

from markdown_table import table
from recorded import GIB, MIB, Json

FLOAT32, BFLOAT16 = 4, 2


def markdown(result: Json) -> str:
    """Tokens a second and first steps by number of adapters; then bytes."""
    plan, where, found = result["plan"], result["environment"], result["throughput"]
    model = plan["model"]
    rows = []
    for n in plan["adapters"]:
        lora, shared = found[f"lora {n}"], found[f"shared {n}"]
        rows.append(
            [
                str(n),
                f"{lora['tokens_per_second']:.0f}",
                f"{shared['tokens_per_second']:.0f}",
                f"**{shared['to_lora']:.2f}** ({spread(shared, lora)})",
                f"{lora['to_base']:.2f}",
                f"{shared['to_base']:.2f}",
                f"{shared['first_to_lora']:.2f}",
            ]
        )
    header = (
        "adapters",
        "vLLM's LoRAs",
        "shared basis",
        "ratio (least–most)",
        "LoRAs ÷ none",
        "shared ÷ none",
        "prompts",
    )
    same = min(result["same_tokens"].values())
    agreement = "Both say the same, token by token." if same == 1 else f"Both say the same in {same:.3f} of requests."
    return (
        f"**vLLM {where['vllm']} on a CPU, many adapters**: a random Llama, {model['hidden']} wide, {model['layers']} "
        f"layers; adapters of r = {result['r']} for all its linear modules, k = {result['k']}. Tokens a second while "
        f"{plan['requests']} requests decode {plan['tokens']} tokens each after prompts of {plan['prompt']}; the model "
        f"without adapters makes {found['base']['tokens_per_second']:.0f}. *Prompts*: the time of the step that reads "
        f"them, shared basis ÷ vLLM's LoRAs. {agreement}\n\n"
        f"{table(header, rows)}\n\n{bytes_table(result)}\n\n"
        f"`{result['command']}`; {where['processor']}, one thread, torch {where['torch']}, float32, eager, seed "
        f"{result['seed']}; medians of {len(found['base']['rounds'])} interleaved rounds, load at the start "
        f"{result['load_at_start']:.1f}. On a CPU vLLM multiplies LoRAs by plain torch, which copies each row's "
        "factors: on a GPU, with its own kernels, ratios of time will be others. Bytes will not."
    )


def spread(ours: Json, theirs: Json) -> str:
    """The least and the largest ratio within a round."""
    ratios = [one / other for one, other in zip(ours["rounds"], theirs["rounds"], strict=True)]
    return f"{min(ratios):.2f}–{max(ratios):.2f}"


def bytes_table(result: Json) -> str:
    """A slot and the basis: laid out by the engines that were measured, and computed for a model that was not."""
    slots, held = max(result["plan"]["adapters"]), result["bytes"]
    lora, shared = held[f"lora {slots}"], held[f"shared {slots}"]
    large = result["llama_3_8b"]
    n = large["adapters"]
    rows = [
        [
            "this model, float32, measured",
            size(lora["slots"] / slots),
            size(shared["slots"] / slots),
            size(shared["basis"]),
            f"{slots}: {size(lora['slots'])}",
            size(shared["slots"] + shared["basis"]),
            f"{lora['slots'] / (shared['slots'] + shared['basis']):.1f}",
        ],
        [
            "Llama-3-8B, bfloat16, computed",
            *(size(BFLOAT16 * large[what]) for what in ("lora", "shared", "basis")),
            f"{n:,}: {size(BFLOAT16 * n * large['lora'])}",
            size(BFLOAT16 * (n * large["shared"] + large["basis"])),
            f"{n * large['lora'] / (n * large['shared'] + large['basis']):.1f}",
        ],
    ]
    header = (
        "bytes in the engine",
        "a LoRA's slot",
        "a slot with shared basis",
        "basis",
        "LoRAs",
        "shared, all",
        "ratio",
    )
    return table(header, rows)


def size(n: float) -> str:
    unit, words = (GIB, "GiB") if n >= GIB else (MIB, "MiB")
    return f"{n / unit:.2f} {words}"
