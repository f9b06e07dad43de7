"""MkDocs hook: the page *JSON of each command*, made from the docstrings of the classes that `--json` prints."""

import dataclasses
import inspect
import re
from typing import Any

from eigenlorax.core import license as licences
from eigenlorax.core import update_changes
from eigenlorax.fitting import refit, verify
from eigenlorax.merging import comparison
from eigenlorax.pack import history, history_figures, manifest, prune, record, summary, track
from eigenlorax.search import match
from eigenlorax.serving.vllm import checking, plan
from eigenlorax.train import (
    baselines,
    comparison_summary,
    demo,
    evaluate,
    figures,
    method_comparison,
    training_record,
)

PAGE = "reference/json.md"
SECTIONS: dict[str, tuple[type, ...]] = {
    "A pack's figures": (
        summary.Summary,
        manifest.FitInfo,
        summary.Components,
        summary.TrainingBasis,
        summary.Errors,
        summary.Bytes,
        summary.FileBytes,
        record.Record,
    ),
    "`eigenlorax inspect`": (history_figures.HistoryFigures, licences.License, verify.Verified),
    "`eigenlorax refit`": (refit.Change,),
    "`eigenlorax merge`": (comparison.Comparison, comparison.SourceShare, comparison.PairRelation),
    "`eigenlorax train`": (training_record.TrainingResult, baselines.Baseline),
    "`eigenlorax evaluate`": (
        evaluate.EvaluationResult,
        figures.ClassificationFigures,
        figures.LanguageModelFigures,
    ),
    "`eigenlorax compare`": (
        method_comparison.ComparisonResult,
        comparison_summary.MethodSummary,
        comparison_summary.Difference,
    ),
    "`eigenlorax find`": (match.Match,),
    "`eigenlorax track`": (track.Tracked,),
    "`eigenlorax log`": (history.VersionRecord,),
    "`eigenlorax diff`": (update_changes.UpdateChange, update_changes.AdapterChange),
    "`eigenlorax prune`": (prune.Pruned,),
    "`eigenlorax serve-check`": (
        checking.Check,
        checking.ServingMode,
        plan.Plan,
        plan.Choices,
        plan.MemoryUse,
    ),
    "`eigenlorax demo`": (demo.Outcome,),
}


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=markdown()))
    return files


def markdown() -> str:
    """Return the page in Markdown: the fields of each class, by the command that prints it."""
    introduction = (
        "# JSON of each command\n\nThis page is made from the docstrings of the classes that `--json` prints. "
        "`None` is null in JSON. [Output, exit codes and JSON](../cli.md) describes fields that belong to no class.\n"
    )
    return introduction + "".join(
        f"\n## {title}\n" + "".join(_section(one) for one in classes) for title, classes in SECTIONS.items()
    )


def meanings(of: type) -> dict[str, str]:
    """Return field → meaning, from the `Attributes` of a docstring. An entry may describe several fields."""
    text = (inspect.getdoc(of) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE)
    return {name.strip(): " ".join(meaning.split()) for names, meaning in entries for name in names.split(",")}


def _section(of: type) -> str:
    (purpose, *_), explained = (inspect.getdoc(of) or "").split("\n\n"), meanings(of)
    rows = (f"- `{field.name}` (`{_kind(field.type)}`): {explained[field.name]}\n" for field in dataclasses.fields(of))
    return f"\n### {of.__name__}\n\n{' '.join(purpose.split())}\n\n{''.join(rows)}"


def _kind(annotation: Any) -> str:
    """Return an annotation without the modules of its classes."""
    name = annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else annotation
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(name))
