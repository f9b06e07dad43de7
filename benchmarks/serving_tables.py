"""Tables of what is done with a pack: projecting, exporting, loading, switching, mixing, training; and of its bytes."""

from markdown_table import table
from recorded import MIB, NAMES, Json, by_method, section, words_of


def use_table(result: Json) -> str:
    """One adapter projected, and one written."""
    cases = by_method(section(result, "use"))
    if not cases:
        return ""
    rows = [
        [NAMES[method], *(f"{1e3 * case[f'{what}_seconds']:.1f}" for what in ("project", "export"))]
        for method, (case, *_) in cases.items()
    ]
    sizes = words_of(next(iter(cases.values()))[0]["shape"])
    return (
        f"**One adapter projected on bases that are there, and one written as a PEFT LoRA**, {sizes}: milliseconds.\n\n"
        f"{table(('', 'project', 'export'), rows)}"
    )


def serving_tables(result: Json) -> str:
    """Loading, switching and mixing beside PEFT's LoRA."""
    cases = {case["options"]["part"]: case for case in section(result, "serving") if "part" in case["options"]}
    blocks = [loading_table(cases["loading"])] if "loading" in cases else []
    for part, title in (
        ("decode", "A decoding step of 64 rows"),
        ("encoder", "An encoder on 64 rows of 32 tokens"),
    ):
        if part in cases:
            blocks.append(mixing_table(title, cases[part]["found"]))
    if "prefill" in cases:
        rows = [
            [size, *(f"{one[name]['to_base']:.2f}" for name in ("bank", "peft"))]
            for size, one in cases["prefill"]["found"].items()
        ]
        header = ("rows × tokens", "bank", "PEFT LoRA")
        blocks.append(f"**One adapter on whole prompts**: seconds ÷ the base model's.\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def loading_table(case: Json) -> str:
    one = case["found"]
    rows = [
        ["load one adapter, the first ones", f"{one['milliseconds_of_the_first_tenth']:.2f}"],
        [f"load one adapter, the last ones of {one['adapters']:,}", f"{one['milliseconds_of_the_last_tenth']:.2f}"],
        ["switch to one adapter", f"{one['set_adapter_milliseconds']:.3f}"],
        ["lay out a batch of 64 adapters", f"{one['using_64_milliseconds']:.2f}"],
    ]
    theirs = [
        f"{one['peft_milliseconds_of_the_first_five']:.1f}",
        f"{one['peft_milliseconds_of_the_last_five']:.1f} (of {one['peft_adapters']})",
        "–",
        "–",
    ]
    header = ("milliseconds", "bank", "PEFT LoRA")
    cells = [[*row, other] for row, other in zip(rows, theirs, strict=True)]
    return (
        f"**Loading and switching on the shapes of BERT-base**: a pack of {one['adapters']:,} adapters in "
        f"{one['median_seconds']:.1f} s; the bank holds {one['bank_bytes'] / MIB:.0f} MiB, "
        f"{one['bank_bytes_ratio']:.2f} of the pack's tensors.\n\n{table(header, cells)}"
    )


def mixing_table(title: str, found: Json) -> str:
    numbers = sorted(int(name.split()[1]) for name in found if name.startswith("bank"))
    rows = [[str(n), *(f"{found[f'{who} {n}']['to_base']:.2f}" for who in ("bank", "peft"))] for n in numbers]
    header = ("adapters in the batch", "bank", "PEFT LoRA")
    return f"**{title}**: seconds ÷ the base model's.\n\n{table(header, rows)}"


def activations_table(result: Json) -> str:
    """What a layer keeps for backward."""
    for case in section(result, "serving"):
        if "width" in case:
            rows = [
                [name, f"{one['trained_numbers']:,}", f"{one['activation_bytes'] / MIB:.2f}"]
                for name, one in sorted(case["found"].items())
            ]
            return (
                f"**Kept for backward** by one layer {case['width']} wide beyond its own input, {case['rows']} rows, "
                f"k = {case['k']}, float32.\n\n{table(('', 'trained numbers', 'MiB'), rows)}"
            )
    return ""


def bytes_table(result: Json) -> str:
    """A pack's bytes by its formula and in its files."""
    cases = sorted(section(result, "bytes"), key=lambda case: case["options"]["adapters"])
    if not cases:
        return ""
    rows = [
        [
            f"{case['options']['adapters']:,}",
            *(f"{case[name]:,}" for name in ("lora_bytes", "formula_bytes", "tensor_file_bytes", "file_bytes")),
            f"{case['lora_bytes'] / case['file_bytes']:.2f}",
        ]
        for case in cases
    ]
    one = cases[0]["options"]
    header = ("N", "LoRAs' tensors", "pack, by formula", "its safetensors files", "all its files", "LoRAs ÷ files")
    return (
        f"**Bytes of a pack**, float32, {one['modules']} modules of {one['dimension']} × {one['dimension']}, r = "
        f"{one['rank']}, k = {one['k']}; formula: of each side k·(d + 1), and N·k·r.\n\n{table(header, rows)}"
    )
