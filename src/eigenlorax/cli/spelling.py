"""Messages of the library for the command line: options instead of Python's keywords, such as `-k 32` for
`n_components=32`.
"""

import re

OPTIONS = {
    "adapters": "--adapters",
    "allow_pickle": "--allow-pickle",
    "alpha": "--alpha",
    "base_config": "--base-config",
    "basis": "--basis",
    "batch_size": "--batch-size",
    "carry_missing": "--carry-missing",
    "coefficient_dtype": "--coefficient-dtype",
    "device": "--device",
    "dtype": "--dtype",
    "energy": "--energy",
    "engine": "--engine",
    "epochs": "--epochs",
    "evaluation": "--eval",
    "exclude_adapters": "--exclude-adapter",
    "exclude_modules": "--exclude-module",
    "extend": "--extend",
    "extra_seed": "--extra-seed",
    "format": "--format",
    "gpus": "--tensor-parallel-size",
    "head_error": "--head-error",
    "head_learning_rate": "--head-learning-rate",
    "interval": "--interval",
    "keep_every": "--keep-every",
    "keep_last": "--keep-last",
    "labels": "--labels",
    "learning_rate": "--learning-rate",
    "left_out": "--left-out",
    "lossless": "--lossless",
    "max_bytes": "--max-bytes",
    "max_bytes_per_adapter": "--max-bytes-per-adapter",
    "max_cpu_loras": "--max-cpu-loras",
    "max_error": "--max-error",
    "max_length": "--max-length",
    "max_loras": "--max-loras",
    "metric": "--metric",
    "model": "--model",
    "n_components": "-k",
    "n_extra": "--n-extra",
    "n_gradient": "--n-gradient",
    "overwrite": "--overwrite",
    "purpose": "--for",
    "r": "--rank",
    "ratio": "--ratio",
    "reference": "--reference",
    "residual": "--residual",
    "resume": "--resume",
    "same_base": "--same-base",
    "seed": "--seed",
    "serve_within": "--serve-within",
    "skip_bad": "--skip-bad",
    "solver": "--solver",
    "start": "--start",
    "sweeps": "--sweeps",
    "task": "--task",
    "tensor_parallel_size": "--tensor-parallel-size",
    "warn_above": "--warn-above",
    "weighting": "--weighting",
    "workers": "--workers",
}
"""Options of the command line, by the keywords of Python's functions."""

_QUOTES = "[]'"
# not within a path or a quoted name
_BEFORE = r"(?<![\w/\\'\"=.-])"
_VALUE = r"(?:\[[^\]]*\]|'[^']*'|\([^)]*\)|[^\s,;:()'\"`/]+?(?=[.?!]?(?:[\s,;:)`]|$)))"
# fields of configs, names of adapters and words of sentences too, so replaced before "must" only
_AMBIGUOUS = ("alpha", "r", "seed")
_KEYWORDS = "|".join(keyword for keyword in OPTIONS if keyword not in _AMBIGUOUS)
# words that mean other things in sentences are replaced at their start and in lists of options only
_UNIQUE = "|".join(keyword for keyword in OPTIONS if "_" in keyword)

_KEYWORD_AND_OPTION = re.compile(rf"{_BEFORE}`?\w[\w.]*=({_VALUE})?`?(?: …)?`? \(`?(--?[a-z][^()`]*)`?\)")
_OPTION_AND_KEYWORD = re.compile(rf"((?:--[a-z-]+|-k)(?: [^\s()`]+)?`?)(?: \(`?\w+=[^()]*\)|, (?:{_KEYWORDS})\b(?!=))")
_ASSIGNED_AND_OPTION = re.compile(rf"{_BEFORE}({_KEYWORDS})=(?:{_VALUE})?, (--[a-z-]+|-k)(?![\w-])")
_COLUMN = re.compile(r"Columns(?:\.\w+|\([^)]*\)) \((--[a-z-]+)\)")
_NAME_AND_OPTION = re.compile(rf"{_BEFORE}(?:{_KEYWORDS})(?: \((--[a-z-]+|-k)\)|, (--[a-z-]+|-k))(?![\w-])")
_ASSIGNED = re.compile(rf"{_BEFORE}({_KEYWORDS})=({_VALUE})?")
_NAME = re.compile(rf"{_BEFORE}({_UNIQUE})\b(?![=/])")
_FIRST_WORD = re.compile(rf"^((?:{_KEYWORDS})(?= (?:must|is) )|(?:{'|'.join(_AMBIGUOUS)})(?= must ))")
_REMOVED = re.compile(rf"(?<=\bRemove )({_KEYWORDS})\b(?!=)")
_IN_LIST = re.compile(rf"((?:--[a-z-]+|-k)(?:, | and | or ))({_KEYWORDS})\b(?!=)")


def on_command_line(message: str) -> str:
    """Return a message of the library with the options of the command line in place of Python's keywords."""
    message = _KEYWORD_AND_OPTION.sub(lambda match: _with_value(match[2], match[1]), message)
    message = _ASSIGNED_AND_OPTION.sub(lambda match: match[2 if OPTIONS[match[1]] == match[2] else 0], message)
    message = _COLUMN.sub(r"\1", message)
    message = _OPTION_AND_KEYWORD.sub(r"\1", message)
    message = _NAME_AND_OPTION.sub(lambda match: match[1] or match[2], message)
    message = _ASSIGNED.sub(lambda match: _with_value(OPTIONS[match[1]], match[2]), message)
    for pattern in (_NAME, _FIRST_WORD, _REMOVED):
        message = pattern.sub(lambda match: OPTIONS[match[1]], message)
    # each match makes the next word of the list follow an option
    while (replaced := _IN_LIST.sub(lambda match: match[1] + OPTIONS[match[2]], message)) != message:
        message = replaced
    return message


def _with_value(option: str, value: str | None) -> str:
    """Return an option with its value, unless it has one already, or the value is that of a flag."""
    if " " in option or value in (None, "True", "...") or option.startswith("--no-"):
        return option
    if value == "False":
        return option.replace("--", "--no-", 1)
    # 'float16' and ['query'] as they are written there
    return f"{option} {value.strip(_QUOTES)}"
