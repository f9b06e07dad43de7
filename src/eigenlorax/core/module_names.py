"""Matching of modules that have different names in different adapters and in a subspace.

Names may differ by leading components (`bert.encoder…`, `encoder…`), since adapters are trained on a model with or
without its head, and by what transformers has renamed (`renamed_modules`).
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from ..errors import ModuleNameError
from .renamed_modules import count_renamings, newest_name

# a number between dots, as in "layers.3.attention"
_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Return 3 and `layers.*.attention` for `layers.3.attention`: the first number, and the name without numbers.

    The layer is None for a name without a number between dots.
    """
    layer = _NUMBER.search(name)
    return int(layer[0]) if layer else None, _NUMBER.sub("*", name)


def natural_order(name: str) -> list[str | int]:
    """Return a sort key by which `layers.10` follows `layers.9`."""
    # texts and numbers alternate, so that like is compared with like
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,9})", name)]


def without_first_component(name: str) -> str | None:
    """Return `encoder.x` for `bert.encoder.x`; None for a name of one component."""
    _, dot, remainder = name.partition(".")
    return remainder if dot else None


def suffixes(name: str) -> Iterator[str]:
    """Yield `a.b.c`, then `b.c`, then `c`."""
    suffix: str | None = name
    while suffix is not None:
        yield suffix
        suffix = without_first_component(suffix)


def canonical_names(adapters: Iterable[Iterable[str]]) -> dict[str, str]:
    """Return the name in the subspace for each module name of any adapter.

    Names that differ only by a leading component are one module, and the longest form is taken, unless some adapter
    has both: then they are two modules. Names before and after a renaming by transformers are one module too, and
    the newest is taken.

    Args:
        adapters: Module names of each adapter.

    Raises:
        ModuleNameError: A short name fits two longer ones, or two modules of one adapter would become one.
    """
    # a set of sets, because most adapters of a collection have the same modules
    name_sets = {frozenset(names) for names in adapters}
    longest = _longest_forms(name_sets)
    longest_sets = {frozenset(longest[name] for name in names) for names in name_sets}
    by_newest: dict[str, list[str]] = {}
    for name in sorted(frozenset().union(*longest_sets), key=lambda name: (count_renamings(name), name)):
        by_newest.setdefault(newest_name(name), []).append(name)
    renamed = [names for names in by_newest.values() if len(names) > 1]
    for names in longest_sets:
        for same_module in renamed:
            if len(clash := [name for name in same_module if name in names]) > 1:
                raise ModuleNameError(
                    f"modules {clash[0]!r} and {clash[1]!r} of one adapter could be the same module, which "
                    "transformers has renamed. Fit the adapters separately, or leave the module out with "
                    f"exclude_modules=[{clash[1]!r}] (--exclude-module {clash[1]})."
                )
    # a renaming may bring names together that differ by a leading component, so prefixes are compared once more
    newest_longest = _longest_forms({frozenset(map(newest_name, names)) for names in longest_sets})
    return {name: by_newest[newest_longest[newest_name(form)]][0] for name, form in longest.items()}


def _longest_forms(name_sets: Collection[frozenset[str]]) -> dict[str, str]:
    """Return for each name the longest name of another adapter that differs from it by leading components."""
    all_names = frozenset().union(*name_sets)
    parents: dict[str, list[str]] = {}
    for name in sorted(all_names):
        short = without_first_component(name)
        # two modules of one adapter are different modules, however similar their names are
        if short in all_names and not any(name in names and short in names for names in name_sets):
            parents.setdefault(short, []).append(name)
    # chains of prefixes are followed to the end, so each name may have a single longer form
    for short, longer in parents.items():
        if len(longer) > 1:
            raise ModuleNameError(
                f"module {short!r} of one adapter could be {longer[0]!r} or {longer[1]!r} of others. Fit the adapters "
                f"separately, or leave the module out with exclude_modules=[{short!r}] (--exclude-module {short})."
            )

    def longest(name: str) -> str:
        return longest(parents[name][0]) if name in parents else name

    forms = {name: longest(name) for name in all_names}
    for names in name_sets:
        # via the names of third adapters, two modules of one adapter may still have ended as one
        if len({forms[name] for name in names}) < len(names):
            clash = next(name for name in sorted(names) if forms[name] != name and forms[name] in names)
            raise ModuleNameError(
                f"modules {clash!r} and {forms[clash]!r} of one adapter are one module by the names that other "
                "adapters have for them. Fit the adapters separately, or leave the module out with "
                f"exclude_modules=[{clash!r}] (--exclude-module {clash})."
            )
    return forms


def resolve(name: str, modules: Iterable[str]) -> str | None:
    """Return the module of a subspace that `name` refers to, or None.

    That is the module of the same name; otherwise the only one that differs by leading components; otherwise the only
    one that also differs by a renaming of transformers.

    Raises:
        ModuleNameError: Two modules fit.
    """
    modules = frozenset(modules)
    if name in modules:
        return name
    for normalise in (_unchanged, newest_name):
        normal_name = normalise(name)
        # a scan over a few hundred names takes less time than building an index of their suffixes
        matches = [module for module in modules if _is_suffix_of_other(normalise(module), normal_name)]
        if matches:
            return _only_match(name, matches)
    return None


def resolve_all(names: Iterable[str], modules: Iterable[str]) -> dict[str, str | None]:
    """Resolve all modules of one adapter at once, no two of them to the same module of the subspace.

    Exact names are assigned first, then names that differ by leading components, then renamed ones, each time among
    the modules that are still free.

    Raises:
        ModuleNameError: Two modules of the subspace fit a name, or two names fit one module.
    """
    names, free = list(names), frozenset(modules)
    resolved: dict[str, str | None] = dict.fromkeys(names)
    resolved |= {name: name for name in names if name in free}
    for normalise in (_unchanged, newest_name):
        # a module that is taken by a closer name does not compete any more
        free -= {module for module in resolved.values() if module is not None}
        index = _SuffixIndex(free, normalise)
        matched = {name: index.find(name) for name, module in resolved.items() if module is None}
        claimed_by: dict[str, str] = {}
        for name, module in matched.items():
            if module is not None and claimed_by.setdefault(module, name) != name:
                raise ModuleNameError(
                    f"modules {claimed_by[module]!r} and {name!r} of one adapter both fit the module {module!r} of the "
                    "subspace."
                )
        resolved |= matched
    return resolved


def _unchanged(name: str) -> str:
    return name


class _SuffixIndex:
    """Modules by every suffix of their normalised names."""

    def __init__(self, modules: Iterable[str], normalise: Callable[[str], str]) -> None:
        self._normalise = normalise
        self._by_name: dict[str, list[str]] = {}
        self._by_suffix: dict[str, list[str]] = {}
        for module in sorted(modules):
            normal_name = normalise(module)
            self._by_name.setdefault(normal_name, []).append(module)
            for suffix in suffixes(normal_name):
                self._by_suffix.setdefault(suffix, []).append(module)

    def find(self, name: str) -> str | None:
        """Return the only module whose name equals, ends with, or is a suffix of `name`."""
        normal_name = self._normalise(name)
        longer = self._by_suffix.get(normal_name, [])
        shorter = [module for suffix in list(suffixes(normal_name))[1:] for module in self._by_name.get(suffix, [])]
        matches = [*longer, *shorter]
        return _only_match(name, matches) if matches else None


def _only_match(name: str, matches: Sequence[str]) -> str:
    if len(matches) > 1:
        first, second, *_ = sorted(matches)
        raise ModuleNameError(f"module {name!r} fits two modules of the subspace, {first!r} and {second!r}.")
    return matches[0]


def _is_suffix_of_other(left: str, right: str) -> bool:
    """Return whether the names are equal, or one is a suffix of the other at a dot."""
    return left == right or left.endswith(f".{right}") or right.endswith(f".{left}")
