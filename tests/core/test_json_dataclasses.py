"""JSON as dataclasses: what fits, and what is said of what does not."""

import json
from dataclasses import dataclass

import pytest

from eigenlorax.core.json_dataclasses import JsonTypeError, from_json, reject_constant


@dataclass(frozen=True, slots=True)
class Leaf:
    name: str
    size: float | None


@dataclass(frozen=True, slots=True)
class Tree:
    leaves: list[Leaf]
    by_name: dict[str, Leaf]
    pairs: list[tuple[int, float]]
    many: tuple[int, ...]
    found: bool


LEAF = {"name": "a", "size": 1.5}
TREE = {"leaves": [LEAF], "by_name": {"a": LEAF}, "pairs": [[1, 2.5], [3, 4]], "many": [1, 2, 3], "found": True}


def test_every_field_becomes_what_its_annotation_says():
    leaf = Leaf("a", 1.5)
    found = from_json(Tree, json.loads(json.dumps(TREE)), "tree")
    assert found == Tree([leaf], {"a": leaf}, [(1, 2.5), (3, 4.0)], (1, 2, 3), True)
    assert type(found.pairs[1][1]) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"found": 1}, "tree.found is 1; bool was expected"),
        ({"many": [1, True]}, r"tree.many\[1\] is true; int was expected"),
        ({"pairs": [[1, 2.5, 3]]}, r"tree.pairs\[0\] has 3 items, not 2"),
        ({"pairs": [[1.0, 2.5]]}, r"tree.pairs\[0\]\[0\] is 1.0; int was expected"),
        ({"leaves": [{"name": "a"}]}, r"tree.leaves\[0\] has the fields \['name'\], not \['name', 'size'\]"),
        ({"leaves": {"a": LEAF}}, "tree.leaves is .* list was expected"),
        ({"by_name": {"a": {"name": None, "size": None}}}, "tree.by_name.a.name is null; str was expected"),
        ({"more": 1}, "tree has the fields .*more"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(JsonTypeError, match=message):
        from_json(Tree, {**TREE, **change}, "tree")


def test_none_where_it_may_be():
    assert from_json(Leaf, {"name": "a", "size": None}, "leaf") == Leaf("a", None)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_lacks(constant):
    with pytest.raises(ValueError, match=f"{constant} is not a JSON number"):
        json.loads(f"[{constant}]", parse_constant=reject_constant)
