"""The model card of a pack: the README.md that the Hub shows, made from the manifest."""

import json

from ..core import keys
from ..core.license import License
from ..core.printable import markdown_code
from ..formats import hub_client
from . import history_figures, licenses, purposes, summary
from .manifest import Manifest
from .summary import Errors, Summary
from .tasks import Task

_MAX_LICENCES = 50
"""Largest number of licences of the adapters that are listed."""
_MAX_NAMES = 10
"""Largest number of adapters that are named for each of them."""


def render(listed: Manifest, repo_id: str | None = None, license: str | None = None, task: Task | None = None) -> str:
    """Return the model card: front matter, contents and errors of the pack, and code that loads it.

    Args:
        listed: Manifest of the pack.
        repo_id: Repository from which the code loads the pack; None for the folder of the card.
        license: Identifier of the licence on the Hub, such as "apache-2.0". Default: that of all adapters, if they
            state the same one.
        task: Task of all adapters; None if it is unknown.
    """
    figures = summary.summarize_manifest(listed)
    how_to_use = _use_in_pipelines(listed, repo_id) if figures.family else _use(listed, repo_id, task)
    form = f"Format: `{keys.MANIFEST}`, version {keys.FORMAT_VERSION}."
    contents = [*_figures(figures), *_adapters(listed)]
    if listed.histories and not listed.adapters and not listed.subspace.modules:
        contents = _title_of_histories(figures)
    lines = [
        *_front_matter(listed, figures.family, license or licenses.common(listed.licenses, listed.histories), task),
        *contents,
        *_histories(listed),
        *how_to_use,
        *_licences(listed),
        "",
        form,
    ]
    return "\n".join(lines) + "\n"


def _front_matter(listed: Manifest, family: str | None, license: str | None, task: Task | None) -> list[str]:
    kinds = ["diffusers", "text-to-image"] if family else ["peft"]
    lines = ["---", "library_name: eigenlorax", "tags:", *(f"- {tag}" for tag in ("eigenlorax", "lora", *kinds))]
    # the Hub rejects a card whose base_model is a path
    if listed.base_model and hub_client.may_be_model(listed.base_model):
        # every JSON string is a valid YAML string
        lines += [f"base_model: {json.dumps(listed.base_model)}", "base_model_relation: adapter"]
    if license is not None:
        lines.append(f"license: {json.dumps(license)}")
    if family:
        lines.append("pipeline_tag: text-to-image")
    elif task is not None and task.pipeline_tag is not None:
        lines.append(f"pipeline_tag: {task.pipeline_tag}")
    return [*lines, "---", ""]


def _base(figures: Summary) -> str:
    if figures.base_model:
        return markdown_code(figures.base_model)
    return figures.family or "a base model its adapters do not name"


def _figures(figures: Summary) -> list[str]:
    b = figures.bytes
    lines = [
        f"# {figures.adapters} LoRA adapters of {_base(figures)} over one basis",
        "",
        "This is an [EigenLoRAx](https://arxiv.org/abs/2502.04700) pack: the principal subspace of "
        f"{figures.adapters} LoRA adapters over {figures.modules} modules, and each adapter as coefficients in it.",
        "",
        "| | |",
        "|---|---|",
        f"| weighting | {markdown_code(figures.fit.weighting)} |",
        f"| asked for | {purposes.choice(figures)} |",
        f"| limits | {purposes.limits(figures)} |",
    ]
    for side, components in (("down", figures.down), ("up", figures.up)):
        capped = f", {len(components.capped)} capped" if components.capped else ""
        lines.append(
            f"| components, {summary.SIDE_NAMES[side]} | {components.min} / {components.median:g} / {components.max} "
            f"(min / median / max){capped}; energy {components.energy:.4f} |"
        )
    for group, errors in (("fitted", figures.in_fit), ("projected afterwards", figures.projected)):
        lines += [_error_row(group, errors, is_bound=bool(figures.bounds))] if errors is not None else []
    lines += [
        f"| LoRA bytes, without heads | {b.lora:,} |",
        f"| basis + coefficients + carried bytes | {b.basis:,} + {b.coefficients:,} + {b.carried:,} |",
        *[f"| basis for training and serving, bytes | {b.training_basis:,} |"] * bool(b.training_basis),
        *[_head_row(figures)] * bool(b.heads),
        f"| compression ratio, basis counted | {b.ratio:.2f} |",
        f"| compression ratio, basis not counted | {b.ratio_without_basis:.2f} |",
        "",
    ]
    return lines


def _head_row(figures: Summary) -> str:
    b, bound = figures.bytes, figures.fit.head_error
    storage = "exact" if bound is None else f"coded, each within {bound:g} of its norm"
    return f"| head bytes ({storage}) | {b.heads:,} |"


def _error_row(group: str, errors: Errors, *, is_bound: bool) -> str:
    plural, at_most = "" if errors.adapters == 1 else "s", ", at most" if is_bound else ""
    # if rounding is the only error, the figure would repeat the mean
    has_other_errors = errors.rounding_worst < errors.worst
    rounding = f", of which rounding {errors.rounding_mean:.1e}" if has_other_errors else ""
    return (
        f"| delta error{at_most}, {errors.adapters} adapter{plural} {group} | mean {errors.mean:.4f}, worst "
        f"{errors.worst:.4f} ({markdown_code(errors.worst_adapter)}){rounding} |"
    )


def _adapters(listed: Manifest) -> list[str]:
    lines = [
        "`delta_error` is ‖D − D̂‖ / ‖D‖ of an adapter's weight updates, after rounding to the stored dtype.",
        "",
        "| adapter | ranks | modules | delta_error | in the fit |",
        "|---|---|---|---|---|",
    ]
    for name, entry in listed.adapters.items():
        record = entry.record
        error = "untrained" if record.untrained else f"{'≤ ' * record.bound}{record.delta_error:.4f}"
        ranks, in_fit = ", ".join(map(str, record.ranks)), "yes" if record.in_fit else "no"
        lines.append(f"| {markdown_code(name)} | {ranks} | {record.modules} | {error} | {in_fit} |")
    for name, reason in listed.fit.skipped.items():
        lines.append(f"| {markdown_code(name)} | | | left out: {markdown_code(reason)} | no |")
    return [*lines, ""]


def _title_of_histories(figures: Summary) -> list[str]:
    return [
        f"# Versions of LoRA adapters of {_base(figures)}",
        "",
        "This is an [EigenLoRAx](https://arxiv.org/abs/2502.04700) pack of histories: versions of one adapter, such as "
        "checkpoints of a training run, or adapters that were trained from a common one.",
        "",
    ]


def _histories(listed: Manifest) -> list[str]:
    if not listed.histories:
        return []
    lines = [
        "Each version of a history is coded as its difference to an earlier one, within a bound of ‖D − D̂‖ / ‖D‖ to "
        "its original, or lossless. Bytes include heads.",
        "",
        "| history | versions | latest | bytes | bytes of the sources' files | largest delta_error |",
        "|---|---|---|---|---|---|",
    ]
    for name, history in listed.histories.items():
        figures = history_figures.figures(history)
        sources = "unknown" if figures.source_file_bytes is None else f"{figures.source_file_bytes:,}"
        error = "lossless" if figures.lossless == figures.versions else f"{figures.worst_delta_error:.4f}"
        lines.append(
            f"| {markdown_code(name)} | {figures.versions} | {markdown_code(figures.latest)} | {figures.bytes:,} | "
            f"{sources} | {error} |"
        )
    return [*lines, ""]


def _licences(listed: Manifest) -> list[str]:
    """Return the section about licences, with those of the adapters."""
    lines = [
        "",
        "## Licence",
        "",
        "A pack is derived from its adapters, and they from their base model and their data: the licences of all of "
        "them hold for it. Whoever publishes it should state a licence (`eigenlorax push --license`), and name the "
        "authors of the adapters.",
        "",
    ]
    groups = licenses.by_license(listed.licenses)
    if not groups.keys() - {None}:
        return [*lines, "The pack records no licences of its adapters."]
    lines += [
        "### Licences of the adapters",
        "",
        "Their model cards or files stated these licences when the pack was made.",
        "",
        "| licence | adapters | names |",
        "|---|---|---|",
    ]
    listed_groups = list(groups.items())
    for licence, names in listed_groups[:_MAX_LICENCES]:
        title = "not stated" if licence is None else _licence(licence)
        shown = ", ".join(map(markdown_code, names[:_MAX_NAMES])) + ", …" * (len(names) > _MAX_NAMES)
        lines.append(f"| {title} | {len(names):,} | {shown} |")
    others = listed_groups[_MAX_LICENCES:]
    if others:
        lines.append(f"| {len(others):,} other licences | {sum(len(names) for _, names in others):,} | |")
    return lines


def _licence(licence: License) -> str:
    return markdown_code(licence.title) + (f", {markdown_code(licence.link)}" if licence.link is not None else "")


def _example(listed: Manifest) -> str:
    """Return the name of an adapter or version of the pack."""
    if listed.adapters or not listed.histories:
        return next(iter(listed.adapters), "NAME")
    return next(iter(listed.histories)) + keys.VERSION_MARK + keys.LATEST


def _use(listed: Manifest, repo_id: str | None, task: Task | None) -> list[str]:
    name = _example(listed)
    base = json.dumps(listed.base_model) if listed.base_model else '"BASE"'
    model_class = "AutoModelForCausalLM" if task is None else task.model_class
    has_head = name in listed.adapters and listed.adapters[name].record.head_bytes > 0
    n_labels = f', num_labels=len(list(pack.adapter("{name}").heads.values())[-1])' if has_head and task else ""
    other_classes = "" if task is not None else "  # or the class of the adapter's task"
    folder = f"loras/{keys.file_name(name)}"
    opened = f'ex.Pack.from_pretrained("{repo_id}")' if repo_id else 'ex.Pack.open(".")'
    return [
        "## Use",
        "",
        "```bash",
        "pip install eigenlorax",
        f"eigenlorax export {repo_id or '.'} {name} -o loras/   # an ordinary PEFT LoRA folder: {folder}",
        "```",
        "",
        "```python",
        "import eigenlorax as ex",
        "from peft import PeftModel",
        f"from transformers import {model_class}{other_classes}",
        "",
        f"pack = {opened}",
        f'folder = ex.write_adapter(pack.adapter("{name}"), "{folder}")',
        f"base = {model_class}.from_pretrained({base}{n_labels})",
        "model = PeftModel.from_pretrained(base, folder)",
        "```",
    ]


def _use_in_pipelines(listed: Manifest, repo_id: str | None) -> list[str]:
    name = next(iter(listed.adapters), "NAME")
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
