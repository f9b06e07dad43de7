"""The model card of a pack: a README.md that the Hub shows. A function of the manifest, and of where the pack is."""

import json

from ..core import keys
from ..core.printable import markdown_code
from ..formats import hub
from . import summary
from .manifest import Manifest
from .summary import Errors, Summary


def render(found: Manifest, repo_id: str | None = None) -> str:
    """The card's text: front matter, what is in the pack and what was lost, how to load it from the repository, or from
    the folder that it is in."""
    figures = summary.summarize(
        {name: entry.record for name, entry in found.adapters.items()},
        found.subspace,
        found.fit,
        found.coefficient_dtype,
        base_model=found.base_model,
        revision=found.revision,
    )
    how = _how_in_pipelines(found, repo_id) if figures.family else _how(found, repo_id)
    form = f"Format: `{keys.MANIFEST}`, version {keys.FORMAT_VERSION}."
    lines = [*_front_matter(found, figures.family), *_what(figures), *_adapters(found), *how, "", form]
    return "\n".join(lines) + "\n"


def _front_matter(found: Manifest, family: str | None) -> list[str]:
    kinds = ["diffusers", "text-to-image"] if family else ["peft"]
    lines = ["---", "library_name: eigenlorax", "tags:", *(f"- {tag}" for tag in ("eigenlorax", "lora", *kinds))]
    # the Hub refuses a card with a path there
    if found.base_model and hub.may_be_model(found.base_model):
        # JSON strings are YAML strings, whatever is in them
        lines.append(f"base_model: {json.dumps(found.base_model)}")
    return [*lines, "---", ""]


def _what(figures: Summary) -> list[str]:
    b = figures.bytes
    base = figures.family or "a base model its adapters do not name"
    if figures.base_model:
        base = markdown_code(figures.base_model)
    lines = [
        f"# {figures.adapters} LoRA adapters of {base} over one basis",
        "",
        "This is an [EigenLoRAx](https://arxiv.org/abs/2502.04700) pack: the principal subspace of "
        f"{figures.adapters} LoRA adapters over {figures.modules} modules, and each adapter as coefficients in it.",
        "",
        "| | |",
        "|---|---|",
        f"| weighting | {markdown_code(figures.fit.weighting)} |",
        f"| asked for | {figures.fit.size} |",
    ]
    for side, found in (("down", figures.down), ("up", figures.up)):
        capped = f", {len(found.capped)} capped" if found.capped else ""
        lines.append(
            f"| components, {summary.SIDE_NAMES[side]} | {found.min} / {found.median:g} / {found.max} (min / median / "
            f"max){capped}; energy {found.energy:.4f} |"
        )
    for group, errors in (("fitted", figures.in_fit), ("projected afterwards", figures.projected)):
        lines += [_error_row(group, errors, is_bound=bool(figures.bounds))] if errors is not None else []
    lines += [
        f"| LoRA bytes, heads aside | {b.lora:,} |",
        f"| basis + coefficients + carried bytes | {b.basis:,} + {b.coefficients:,} + {b.carried:,} |",
        f"| compression ratio, basis counted | {b.ratio:.2f} |",
        f"| compression ratio, basis not counted | {b.ratio_without_basis:.2f} |",
        "",
    ]
    return lines


def _error_row(group: str, errors: Errors, *, is_bound: bool) -> str:
    plural, at_most = "" if errors.adapters == 1 else "s", ", at most" if is_bound else ""
    return (
        f"| delta error{at_most}, {errors.adapters} adapter{plural} {group} | mean {errors.mean:.4f}, worst "
        f"{errors.worst:.4f} ({markdown_code(errors.worst_adapter)}), of which rounding {errors.rounding_mean:.1e} |"
    )


def _adapters(found: Manifest) -> list[str]:
    lines = [
        "`delta_error` is ‖D − D̂‖ / ‖D‖ of an adapter's weight updates, after rounding to the stored dtype.",
        "",
        "| adapter | ranks | modules | delta_error | in the fit |",
        "|---|---|---|---|---|",
    ]
    for name, entry in found.adapters.items():
        one = entry.record
        error = "untrained" if one.untrained else f"{'≤ ' * one.bound}{one.delta_error:.4f}"
        ranks = ", ".join(map(str, one.ranks))
        lines.append(f"| {markdown_code(name)} | {ranks} | {one.modules} | {error} | {'yes' if one.in_fit else 'no'} |")
    for name, reason in found.fit.skipped.items():
        lines.append(f"| {markdown_code(name)} | | | left out: {markdown_code(reason)} | no |")
    return [*lines, ""]


def _how(found: Manifest, repo_id: str | None) -> list[str]:
    name = next(iter(found.adapters), "NAME")
    opened = f'ex.Pack.from_pretrained("{repo_id}")' if repo_id else 'ex.Pack.open(".")'
    return [
        "## Use",
        "",
        "```bash",
        "pip install eigenlorax",
        f"eigenlorax export {repo_id or '.'} {name} -o loras/   # an ordinary PEFT LoRA folder: loras/{name}",
        "```",
        "",
        "```python",
        "import eigenlorax as ex",
        "from peft import PeftModel",
        "",
        f"pack = {opened}",
        f'folder = ex.write_adapter(pack.adapter("{name}"), "loras/{name}")',
        "model = PeftModel.from_pretrained(base_model, folder)",
        "```",
    ]


def _how_in_pipelines(found: Manifest, repo_id: str | None) -> list[str]:
    name = next(iter(found.adapters), "NAME")
    where = repo_id or "."
    return [
        "## Use",
        "",
        "```bash",
        "pip install 'eigenlorax[diffusers]'",
        f"eigenlorax export {where} {name} -o loras/   # an ordinary LoRA, in the dialect that it came in",
        "```",
        "",
        "```python",
        "import eigenlorax as ex",
        "",
        f'ex.load_into(pipe, "{where}", ["{name}"])  # pipe: a pipeline of diffusers',
        f'pipe.set_adapters(["{name.replace(".", "_")}"], adapter_weights=[0.8])',
        "```",
    ]
