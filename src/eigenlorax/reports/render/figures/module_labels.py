"""Kinds of modules under short names: what rows and legends call them."""

from collections.abc import Iterable, Sequence

from ...data import ModuleFigures


def labels(kinds: Iterable[str]) -> dict[str, str]:
    """For each kind its last components, as many as tell it from the others: "query", "output.dense"."""
    found = list(dict.fromkeys(kinds))
    parts = {kind: [part for part in kind.split(".") if part != "*"] or [kind] for kind in found}
    deepest = max((len(part) for part in parts.values()), default=0)
    short: dict[str, str] = {}
    for kind in found:
        for length in range(1, deepest + 1):
            label = parts[kind][-length:]
            if all(parts[other][-length:] != label for other in found if other != kind):
                short[kind] = ".".join(label)
                break
        else:
            short[kind] = kind
    return short


def grouped(modules: Sequence[ModuleFigures], most: int) -> dict[str, list[ModuleFigures]]:
    """Modules by the label of their kind, in order of appearance; beyond `most`, the last ones are one group."""
    names = labels(module.kind for module in modules)
    groups: dict[str, list[ModuleFigures]] = {}
    for module in modules:
        groups.setdefault(names[module.kind], []).append(module)
    if len(groups) <= most:
        return groups
    kept = dict(list(groups.items())[: most - 1])
    rest = [label for label in groups if label not in kept]
    kept[f"{len(rest)} others"] = [module for label in rest for module in groups[label]]
    return kept
