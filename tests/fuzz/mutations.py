"""Changes drawn at random, by what a file is: JSON, tensors, coded bytes, lines, a pickle, or no plain file at all."""

import json
import struct
from collections.abc import Callable
from fnmatch import fnmatchcase
from hashlib import sha256
from random import Random
from typing import Any

from eigenlorax.core import keys

from . import changes, documents
from .changes import Change, Tree
from .documents import ANY, Long, Raw, nested, raw

INTEGERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    3,
    127,
    255,
    65536,
    10_000_000,
    2**31,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**400,
    Raw((("9", 5000),)),
)
FLOATS: tuple[Any, ...] = (
    0.0,
    -0.0,
    0.5,
    1.0,
    1e-320,
    1e160,
    1e300,
    -1e308,
    raw("NaN"),
    raw("Infinity"),
    raw("-Infinity"),
    raw("1e999"),
)
OTHERS: tuple[Any, ...] = (None, True, False)
TEXTS: tuple[Any, ...] = (
    "",
    " ",
    "x",
    ".",
    "..",
    "../x",
    "../../../../../../tmp/x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "a\0b",
    "\ud800",
    "a\udfffb",
    "\u202eabc",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b31m",
    "é\u0301\U0001f600",
    "ﬁ",
    "nan",
    "F32",
    "F8_E4M3",
    "F4",
    "C64",
    "BOOL",
    "I64",
    "float32",
    "int4",
    "coded",
    "full-float16",
    "diagonal-bfloat16",
    "LORA",
    "EIGENLORAX",
    "EIGENLORA",
    "__metadata__",
    "__class__",
    "down",
    "up",
    "(",
    "[a-",
    "(?P<a>x)(?P<a>y)",
    "a{99999999999}",
    "(.*)*X",
    "((a+)+)+$",
    "(a|aa)*(b|bb)*(.*)(.*)(.*)Q",
    "hf://a/b",
    "file:///etc/passwd",
    "<script>alert(1)</script>",
    "| a | b |\n|---|\n# c",
    "%s%n{0}{x}${y}`z`",
    Long("a", 300),
    Long("a.", 5000),
    Long("é", 1_000_000),
)
CONTAINERS: tuple[Any, ...] = (
    [],
    {},
    [[]],
    [None],
    [0],
    ["x"],
    {"": None},
    {"a": {"b": {}}},
    {"a": 1},
    [1, "a", None, {}],
    Raw((("[", 1), ("0,", 100_000), ("0]", 1))),
    nested(40),
    nested(600),
    nested(900, '{"a":', "}"),
    nested(3000),
    nested(200_000),
    nested(200_000, '{"a":', "}"),
)
DTYPES = ("F64", "F32", "F16", "BF16", "C64", "I64", "I32", "I16", "I8", "U64", "U16", "U8", "BOOL", "F8_E4M3")
FILLS = (
    "00",
    "ff",
    "80",
    "01",
    "7f",
    "0000807f",  # infinity of F32
    "0000c07f",  # NaN of F32
    "007c",  # infinity of F16
    "ffff7f7f",  # the largest F32
    "01000000",  # the smallest
    "0000803f",  # 1
)
METADATA = "__metadata__"


def draw(random: Random, tree: Tree, files: list[str]) -> list[Change]:
    """One change, seldom several, of some of an input's files."""
    return [change(random, tree, random.choice(files)) for _ in range(random.choice((1, 1, 1, 1, 1, 2, 2, 3, 5)))]


def change(random: Random, tree: Tree, name: str) -> Change:
    """One change of one file."""
    data = _bytes(tree, name)
    if name.endswith(".safetensors"):
        return tensors(random, name, data)
    if name.endswith((".json", ".jsonl", ".ndjson")):
        return document(random, name, lines(data) if name.endswith(("l", "ndjson")) else json.loads(data))
    return plain_bytes(random, name, data)


def lines(data: bytes) -> list[Any]:
    """The documents of a file of JSON lines."""
    return [json.loads(line) for line in data.splitlines()]


def special(random: Random, tree: Tree) -> Change:
    """A file, or a folder, in whose place is something else."""
    name = random.choice(sorted(tree))
    parts = name.split("/")
    depth = random.choice((len(parts), len(parts), len(parts), random.randint(1, len(parts))))
    return Change("/".join(parts[:depth]), "special", (random.choice(changes.KINDS),))


def document(random: Random, name: str, body: Any) -> Change:
    """A change of a JSON document; seldom one of its bytes."""
    if random.random() < 0.04:
        return plain_bytes(random, name, documents.dumps(body, 1).encode())
    places = list(documents.paths(body))
    # fields that are there many times are changed no more often than others
    fields: dict[Any, list[tuple[str | int, ...]]] = {}
    for place in places:
        fields.setdefault(next((one for one in reversed(place) if isinstance(one, str)), None), []).append(place)
    at = random.choice(fields[random.choice(list(fields))])
    old = documents.at(body, list(at))
    path = list(at)
    if path and random.random() < 0.12:
        path[random.randrange(len(path))] = ANY
    how = random.choice(("set",) * 8 + ("delete", "insert", "rename", "twice", "copy", "copy"))
    if how == "delete" and path:
        return Change(name, how, (list(at),))
    if how == "rename" and path and isinstance(at[-1], str):
        return Change(name, how, (list(at), key(random, body, places)))
    if how == "insert" and isinstance(old, dict | list):
        return Change(name, how, (path, key(random, body, places), value(random, None)))
    if how == "twice" and isinstance(old, dict):
        of = random.choice([*old, "x"])
        return Change(name, how, (list(at), of, value(random, old.get(of))))
    if how == "copy":
        return Change(name, how, (path, list(random.choice(places))))
    return Change(name, "set", (path, value(random, old)))


def key(random: Random, body: Any, places: list[tuple[str | int, ...]]) -> str:
    """A key: one of the document's own, or a text."""
    known = sorted({place[-1] for place in places if place and isinstance(place[-1], str)})
    if known and random.random() < 0.5:
        return str(random.choice(known))
    return str(random.choice([text for text in TEXTS if isinstance(text, str)]))


def value(random: Random, old: Any) -> Any:
    """A value in the place of another: near to it, of its type, or of any type."""
    kind = random.random()
    if kind < 0.3 and (near := _near(old)):
        return random.choice(near)
    if kind < 0.65:
        for types, pool in ((bool, ()), (int, INTEGERS), (float, FLOATS), (str, TEXTS), ((list, dict), CONTAINERS)):
            if isinstance(old, types) and pool:
                return random.choice(pool)
    return random.choice(random.choice((INTEGERS, FLOATS, OTHERS, TEXTS, CONTAINERS)))


def _near(old: Any) -> tuple[Any, ...]:
    """Values that are like another one, or the same in another type."""
    if isinstance(old, bool):
        return (not old,)
    if isinstance(old, int):
        return old + 1, old - 1, -old, 2 * old, old + 2**32, float(old), str(old), [old]
    if isinstance(old, float):
        return -old, old * 2, old * 1e200, raw("NaN"), str(old), round(min(abs(old), 1e9))
    if isinstance(old, str):
        middle = len(old) // 2
        return (
            *(old[:middle] + text + old[middle:] for text in ("x", ".", "\0", "\ud800", "/", "é")),
            old + "x",
            old.upper(),
        )
    if isinstance(old, list) and old:
        return old * 2, old[1:], old[::-1], [old], [*old, None], old[0]
    if isinstance(old, dict) and old:
        return [list(one) for one in old.items()], list(old), dict(reversed(old.items())), next(iter(old.values()))
    return ()


def tensors(random: Random, name: str, data: bytes) -> Change:
    """A change of a safetensors file: of its header as a document, of a tensor, or of bytes."""
    header, _ = changes.split(data)
    kind = random.random()
    if kind < 0.3:
        return document(random, name, header)
    if kind < 0.4:
        return metadata(random, name, header)
    if kind < 0.45:
        return header_bytes(random, name, data)
    own = sorted(key for key in header if key != METADATA)
    if not own or kind < 0.55:
        return plain_bytes(random, name, data)
    chosen = random.choice(own)
    described = header[chosen]
    if described["dtype"] == "U8" and len(described["shape"]) == 1 and random.random() < 0.8:
        return coded(random, name, chosen, described["shape"][0])
    how = random.choice(("tensor",) * 5 + ("drop", "call", "repeat"))
    if how == "drop":
        return Change(name, how, (chosen,))
    if how in ("call", "repeat"):
        return Change(name, how, (chosen, tensor_name(random, own, chosen)))
    return Change(
        name,
        "tensor",
        (
            chosen,
            random.choice((None, None, random.choice(DTYPES))),
            random.choice((None, shape(random, described["shape"]))),
            random.choice((None, random.choice(FILLS))),
        ),
    )


def metadata(random: Random, name: str, header: dict[str, Any]) -> Change:
    """A change of a file's texts about itself."""
    known = header.get(METADATA, {})
    if not known or random.random() < 0.4:
        made = {str(random.choice(("format", "x", "\ud800", "", "ss_note"))): random.choice((*TEXTS, 1, None, {}))}
        return Change(name, "set", ([METADATA], {**known, **made}) if known else ([], {METADATA: made, **header}))
    places = [[METADATA, *place] for place in documents.paths(known) if place]
    place = random.choice(places)
    return Change(name, "set", (place, value(random, documents.at(header, place))))


def header_bytes(random: Random, name: str, data: bytes) -> Change:
    """A change of a header's length or of its text."""
    (length,) = struct.unpack("<Q", data[: changes.HEADER_LENGTH])
    if random.random() < 0.4:
        stated = random.choice((0, 1, 2, length - 8, length + 8, len(data), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1))
        return Change(name, "put", (0, struct.pack("<Q", max(stated, 0)).hex()))
    place = changes.HEADER_LENGTH + random.randrange(max(length, 1))
    return Change(name, "put", (place, bytes([random.choice(b' {}[]",:0123456789abFIU\\u\x00\xff\xed')]).hex()))


def tensor_name(random: Random, known: list[str], old: str) -> str:
    """A key like one of the file's, or like none."""
    parts = old.split(".")
    place = random.randrange(len(parts))
    swapped = [
        *parts[:place],
        random.choice(("x", "0", "", "weight", "lora_A", "lora_B", "default")),
        *parts[place + 1 :],
    ]
    texts = [text for text in TEXTS if isinstance(text, str)]
    return str(random.choice((".".join(swapped), random.choice(known) + ".x", old.upper(), random.choice(texts))))


def shape(random: Random, old: list[int]) -> list[int]:
    """A shape near to another, with no more than some megabytes of numbers."""
    found = list(old)
    how = random.randrange(6)
    if how == 0:
        found.reverse()
    elif how == 1 and found:
        found[random.randrange(len(found))] = random.choice((0, 1, 2, 3, 7, 64, 1000))
    elif how == 2:
        found = [*found, 1]
    elif how == 3:
        found = found[1:]
    elif how == 4:
        found = [1] * random.choice((1, 8, 70)) + found
    elif found:
        place = random.randrange(len(found))
        found[place] = max(found[place] + random.choice((-1, 1)), 0)
    return found


MANIFEST = "pack/subspace_config.json"


def consistent(random: Random, tree: Tree) -> list[Change]:
    """Changes of several files of a pack that go together: a size, a rank, a dtype or a name that is another one in
    all of them."""
    manifest = json.loads(_bytes(tree, MANIFEST))
    modules = manifest["subspace"]["modules"]
    if not modules or not manifest["adapters"]:
        return draw(random, tree, [MANIFEST])
    module, side, adapter = (
        random.choice(sorted(modules)),
        random.choice(("down", "up")),
        random.choice(sorted(manifest["adapters"])),
    )
    kind = random.randrange(6)
    if kind == 5:
        return _of_parent(random, tree, adapter, sorted(manifest["adapters"]))
    if kind == 0:
        return _resized(random, tree, module, side, modules[module][side])
    if kind == 1:
        return _of_rank(random, tree, adapter, random.choice((0, 1, 2, 4, 7, 100, 1000, 1025, 10**6, 2**40, 2**63, -1)))
    if kind == 2:
        dtype = random.choice(
            ("float64", "float32", "float16", "bfloat16", "int8", "int4", "coded", "full-float32", "diagonal-float32")
        )
        stored = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(
            dtype.rpartition("-")[2]
        )
        both = [
            (field, file)
            for field, file in (("dtype", "pack/subspace-*"), ("coefficient_dtype", f"pack/adapters/{adapter}/*"))
            if random.random() < 0.6
        ]
        return [
            change
            for field, file in both
            for change in (
                Change(MANIFEST, "set", ((["subspace"] if field == "dtype" else []) + [field], dtype)),
                *_tensors(tree, file, lambda key, one: (key, stored, None, None)),
            )
        ]
    if kind == 3:
        other = random.choice([text for text in TEXTS if isinstance(text, str)] + ["a" * 5000, f"x.{module}", *modules])
        return [Change("pack/*", "text", (module, other))]
    other = random.choice(sorted(manifest["adapters"]))
    files = sorted(manifest["adapters"][other]["files"])
    return [
        Change(f"pack/adapters/{adapter}/{file}", "as", (f"pack/adapters/{other}/{file}",))
        for file in files
        if random.random() < 0.6
    ]


def _resized(random: Random, tree: Tree, module: str, side: str, info: dict[str, Any]) -> list[Change]:
    """A side with another number of components, or of another width, in the manifest and in the bases."""
    k, width = info["k"], info["dimension"]
    field, place = random.choice((("k", 0), ("dimension", 1)))
    new = random.choice((0, 1, k + 1, 2 * k, width, 1000, 2**22, 2**22 + 1, 2**31, 2**62))
    path = ["subspace", "modules", module, side, field]

    def changed(key: str, described: dict[str, Any]) -> tuple[Any, ...] | None:
        sizes = list(described["shape"])
        if not key.startswith(f"{module}.{side}.components") or len(sizes) != 2:
            return None
        sizes[place] = min(new if described["dtype"] != "U8" else (new + 1) // 2, 5000)
        return key, None, sizes, random.choice((None, *FILLS))

    return [Change(MANIFEST, "set", (path, new)), *_tensors(tree, "pack/subspace-*", changed)]


def _of_parent(random: Random, tree: Tree, adapter: str, names: list[str]) -> list[Change]:
    """An adapter with another parent, or with none, in the manifest, in its config and in its weights."""
    place = f"pack/adapters/{adapter}"
    parent = random.choice((*names, *names, None, "", "x", "../x", adapter.upper(), f"{names[0]}@12345678"))
    digest = random.choice((None, "0" * 64))
    try:
        header, body = changes.split(_bytes(tree, f"pack/adapters/{parent}/{keys.ADAPTER_WEIGHTS}"))
        start, end = header[keys.CODED]["data_offsets"]
        digest = sha256(body[start:end]).hexdigest()
    except KeyError:
        pass
    several = [
        Change(MANIFEST, "set", (["adapters", adapter, "parent"], parent)),
        Change(MANIFEST, "set", (["adapters", adapter, "coefficient_bytes"], 0)),
        Change(f"{place}/{keys.ADAPTER_CONFIG}", "set", ([keys.PARENT], {"name": parent, "sha256": digest})),
        Change(f"{place}/{keys.ADAPTER_WEIGHTS}", "drop", (keys.CODED,)),
    ]
    return several if random.random() < 0.6 else random.sample(several, random.randint(1, 3))


def _of_rank(random: Random, tree: Tree, adapter: str, rank: int) -> list[Change]:
    """An adapter of another rank, in its configs, in the manifest and in its coefficients."""
    place = f"pack/adapters/{adapter}"

    def changed(key: str, described: dict[str, Any]) -> tuple[Any, ...] | None:
        sizes = list(described["shape"])
        if "eigenlorax_" not in key or len(sizes) != 2:
            return None
        sizes[0 if "_down" in key or ".codes" in key or ".scales" in key else 1] = min(max(rank, 0), 5000)
        return key, None, sizes, None

    # a source's config may be stored as differences
    changes = "eigenlorax_changed" in json.loads(_bytes(tree, f"{place}/source_config.json"))
    numbers = [
        Change(f"{place}/{file}", "set", ([*inside, field], rank))
        for file, inside in (
            ("source_config.json", ["eigenlorax_changed"] * changes),
            ("adapter_config.json", []),
        )
        for field in ("r", "lora_alpha")
    ]
    records = [
        Change(MANIFEST, "set", (["adapters", adapter, "ranks"], [rank])),
        Change(MANIFEST, "set", (["adapters", adapter, "lora_numbers"], rank * random.choice((64, 28, 36, 1)))),
    ]
    return [*numbers, *records, *(_tensors(tree, f"{place}/*", changed) if random.random() < 0.7 else [])]


def _tensors(
    tree: Tree, pattern: str, changed: Callable[[str, dict[str, Any]], tuple[Any, ...] | None]
) -> list[Change]:
    """Changes of the tensors of some files: for each that one is given for, its arguments."""
    found = []
    for name in sorted(tree):
        if fnmatchcase(name, pattern) and name.endswith(".safetensors"):
            header, _ = changes.split(_bytes(tree, name))
            header.pop(METADATA, None)
            found += [Change(name, "tensor", one) for key in sorted(header) if (one := changed(key, header[key]))]
    return found


def _bytes(tree: Tree, name: str) -> bytes:
    data = tree[name]
    assert isinstance(data, bytes)
    return data


def coded(random: Random, name: str, chosen: str, length: int) -> Change:
    """A change of a tensor of bytes: of its head, which says how many numbers there are, or of any byte."""
    edge = random.choice((0, 1, 2, 3, 4, 5, 127, 128, 254, 255))
    how = random.randrange(10)
    if how < 3:
        return Change(name, "blob", (chosen, "put", random.randrange(12), bytes([edge]).hex()))
    if how == 3:
        return Change(name, "blob", (chosen, "put", random.randrange(6), "ff" * random.choice((1, 2, 4, 9, 12))))
    if how == 4:
        return Change(name, "blob", (chosen, "put", random.randrange(max(length, 1)), bytes([edge]).hex()))
    if how == 5:
        return Change(name, "blob", (chosen, "end", random.choice((0, 1, 2, 3, 4, 8, length - 1, length // 2))))
    if how == 6:
        return Change(
            name, "blob", (chosen, "add", random.randrange(length + 1), bytes([edge]).hex(), random.choice((1, 2, 100)))
        )
    if how == 7:
        flags = random.choice((0, 1, 2, 3, 4, 8, 2**20, 2**34, 2**55, 2**62))
        return Change(name, "blob", (chosen, "flags", flags))
    if chosen == keys.CODED_COMPONENTS and random.random() < 0.7:
        part = random.choice(
            (
                ("put", random.randrange(8), bytes([edge]).hex()),
                ("put", random.randrange(6), "ff" * random.choice((1, 2, 4, 9, 12))),
                ("end", random.randrange(40)),
                ("add", random.randrange(40), bytes([edge]).hex(), random.choice((1, 3, 1000))),
            )
        )
        return Change(name, "blob", (chosen, "basis", random.randrange(8), *part))
    inner: tuple[Any, ...] = random.choice(
        (
            ("put", random.randrange(40), bytes([edge]).hex()),
            ("put", random.randrange(40), "ff" * random.choice((2, 8, 30))),
            ("end", random.randrange(40)),
            ("add", random.randrange(40), bytes([edge]).hex(), random.choice((1, 3, 1000, 1 << 26))),
        )
    )
    return Change(name, "blob", (chosen, "levels", *inner))


def plain_bytes(random: Random, name: str, data: bytes) -> Change:
    """A change of any file."""
    place = random.randrange(len(data) + 1)
    how = random.randrange(7)
    if how == 0:
        return Change(name, "flip", (place, random.randrange(8)))
    if how == 1:
        return Change(
            name, "put", (place, random.choice(("00", "ff", "0a", "22", "2c", "7b", "c3", "eda080", "0d", "5c")))
        )
    if how == 2:
        return Change(name, "cut", (place, random.choice((1, 2, 8, 100))))
    if how == 3:
        return Change(name, "end", (random.choice((0, 1, 7, 8, 9, len(data) // 2, max(len(data) - 1, 0))),))
    if how == 4:
        return Change(name, "add", (place, random.choice(("00", "0a", "22", "2c", "0d", "efbbbf", "5b", "7b22")), 1))
    if how == 5:
        return Change(
            name, "add", (place, random.choice(("00", "5b", "22", "2c", "61")), random.choice((9, 1000, 200_000)))
        )
    return Change(name, "put", (place, random.randbytes(random.choice((1, 4, 16))).hex()))
