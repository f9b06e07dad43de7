"""Tables of vLLM with many adapters, by `multi_lora.py`: tokens a second, and bytes of slots."""

from markdown_table import table
from recorded import GIB, MIB, Json

BFLOAT16 = 2
SLOTS = (1, 8, 64, 256, 1000)


def markdown(result: Json) -> str:
    """All of it."""
    return f"{speed(result)}\n\n{measured_bytes(result)}\n\n{computed_bytes(result)}"


def speed(result: Json) -> str:
    """Tokens a second and first steps by number of adapters."""
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
    header = ("adapters", "LoRAs", "shared basis", "ratio (least–most)", "LoRAs ÷ none", "shared ÷ none", "prompts")
    same = min(result["same_tokens"].values())
    agreement = "Both say the same, token by token." if same == 1 else f"Both say the same in {same:.3f} of requests."
    return (
        f"**vLLM {where['vllm']} on a CPU, many adapters**: a random Llama, {model['hidden']} wide, {model['layers']} "
        f"layers; adapters of r = {result['r']} for all its linear modules, k = {result['k']}. Tokens a second while "
        f"{plan['requests']} requests decode {plan['tokens']} tokens each after prompts of {plan['prompt']}, by vLLM's "
        f"own LoRAs and with a shared basis; the model without adapters makes "
        f"{found['base']['tokens_per_second']:.0f}. *Prompts*: the time of the step that reads them, shared basis ÷ "
        f"LoRAs. {agreement}\n\n"
        f"{table(header, rows)}\n\n"
        f"`{result['command']}`; {where['processor']}, one thread, torch {where['torch']}, float32, eager, seed "
        f"{result['seed']}; medians of {len(found['base']['rounds'])} interleaved rounds, ratios within a round, load "
        f"at the start {result['load_at_start']:.1f}. On a CPU vLLM multiplies LoRAs by plain torch, which copies each "
        "row's factors: on a GPU, with its own kernels, these ratios will be others."
    )


def spread(ours: Json, theirs: Json) -> str:
    """The least and the largest ratio within a round."""
    ratios = [one / other for one, other in zip(ours["rounds"], theirs["rounds"], strict=True)]
    return f"{min(ratios):.2f}–{max(ratios):.2f}"


def measured_bytes(result: Json) -> str:
    """A slot and the basis, as the engines that were measured have laid them out."""
    slots, held = max(result["plan"]["adapters"]), result["bytes"]
    lora, shared = held[f"lora {slots}"], held[f"shared {slots}"]
    row = [
        str(slots),
        size(lora["slots"] / slots),
        size(shared["slots"] / slots),
        size(shared["basis"]),
        *totals(lora["slots"], shared["slots"] + shared["basis"]),
    ]
    header = ("slots", "a LoRA's", "with shared basis", "the basis", "LoRAs, all", "shared basis, all", "ratio")
    return f"Bytes of the same engines, measured:\n\n{table(header, [row])}"


def computed_bytes(result: Json) -> str:
    """What slots take in a model that was not measured, by the formula that the measured one follows."""
    slot, small, basis = (BFLOAT16 * result["llama_3_8b"][what] for what in ("lora", "shared", "basis"))
    rows = [[f"{n:,}", *totals(n * slot, n * small + basis)] for n in SLOTS]
    return (
        f"Llama-3-8B's shapes, all seven linear layers, in bfloat16, r = {result['r']}, k = {result['k']}, computed: a "
        f"slot takes {size(slot)} for a LoRA, {size(small)} with a shared basis; the basis {size(basis)}, once.\n\n"
        f"{table(('slots', 'LoRAs', 'shared basis, basis counted', 'ratio'), rows)}"
    )


def totals(lora: float, shared: float) -> list[str]:
    return [size(lora), size(shared), f"{lora / shared:.2f}"]


def size(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / MIB:.2f} MiB"
