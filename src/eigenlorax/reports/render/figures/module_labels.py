"""Short labels of kinds of modules, for rows and legends."""

from collections.abc import Iterable, Sequence

from ...data import ModuleFigures


def labels(kinds: Iterable[str]) -> dict[str, str]:
    """Return the shortest unique suffix of each kind, such as "query" or "output.dense"."""
    components = {kind: [name for name in kind.split(".") if name != "*"] or [kind] for kind in dict.fromkeys(kinds)}
    deepest = max((len(names) for names in components.values()), default=0)
    short: dict[str, str] = {}
    for kind, names in components.items():
        for length in range(1, deepest + 1):
            suffix = names[-length:]
            if sum(candidate[-length:] == suffix for candidate in components.values()) == 1:
                short[kind] = ".".join(suffix)
                break
        else:
            short[kind] = kind
    return short


def grouped(modules: Sequence[ModuleFigures], max_groups: int) -> dict[str, list[ModuleFigures]]:
    """Group modules by the label of their kind, in order of appearance.

    Args:
        modules: The modules.
        max_groups: Maximum number of groups. If there are more kinds, the last ones form one group.
    """
    names = labels(module.kind for module in modules)
    groups: dict[str, list[ModuleFigures]] = {}
    for module in modules:
        groups.setdefault(names[module.kind], []).append(module)
    if len(groups) <= max_groups:
        return groups
    first, last = list(groups)[: max_groups - 1], list(groups)[max_groups - 1 :]
    merged = [module for label in last for module in groups[label]]
    return {**{label: groups[label] for label in first}, f"{len(last)} others": merged}
