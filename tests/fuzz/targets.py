"""What is read of a hostile input, kind by kind. A reader may do what it is for, or raise an `EigenloraxError`."""

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import eigenlorax as ex
from eigenlorax.cli import main
from eigenlorax.cli.report import print_verdict
from eigenlorax.core import atomic_files, keys
from eigenlorax.core.subspace import Subspace
from eigenlorax.errors import MAX_MESSAGE, EigenloraxError, PackError
from eigenlorax.formats import checks
from eigenlorax.pack import manifest_json, subspace_file
from eigenlorax.reports import json_document
from eigenlorax.train import data as rows
from eigenlorax.train.options import Columns

from . import changes, mutations, starts
from .changes import Change, Special, Tree

EXIT_CODES = {0, 3, 4}
"""Of the command, where what it reads is at fault: done, or an error of ours."""


class WrongError(Exception):
    """A result that should not be: what was read is no error and not right either."""


def changed(tree: Tree, drawn: list[Change]) -> Tree:
    """The input with changes, in their order."""
    for change in drawn:
        tree = changes.apply(tree, change)
    return tree


@dataclass(frozen=True)
class Target:
    """One kind of input.

    starts: inputs that are right, by name. draw: changes of one. attempt: reads an input in a folder, and returns the
    bytes of the largest adapter that it has exported. weight: its share of all cases. made: the input with changes.
    seconds: processor time that a case may take.
    """

    name: str
    starts: Callable[[], Mapping[str, Tree]]
    draw: Callable[[Random, Tree], list[Change]]
    attempt: Callable[[Path], int]
    weight: int = 10
    made: Callable[[Tree, list[Change]], Tree] = changed
    seconds: float = 2.0


# Packs: digests are made again, so that what is behind them is reached.

MANIFEST = f"pack/{keys.MANIFEST}"


def signed(tree: Tree, drawn: list[Change]) -> Tree:
    """The pack with changes, and with fingerprints and digests that fit them, as its author would sign it.

    The manifest's own fields are changed last: what is drawn for a digest stays what it is.
    """
    of_manifest = [change for change in drawn if fnmatchcase(MANIFEST, change.file)]
    tree = _with_fingerprints(changed(tree, [change for change in drawn if change.file != MANIFEST]), of_manifest)
    manifest = tree.get(MANIFEST)
    if isinstance(manifest, bytes):
        body = json.loads(manifest)
        body.pop("digest", None)
        subspace = tree.get(f"pack/{body['subspace']['file']}")
        if isinstance(subspace, bytes):
            body["subspace"]["sha256"] = atomic_files.digest(subspace)
        for name, entry in body["adapters"].items():
            for file in entry["files"]:
                data = tree.get(f"pack/{keys.ADAPTERS}/{name}/{file}")
                if isinstance(data, bytes):
                    entry["files"][file] = atomic_files.digest(data)
        tree = _with_version_files(tree, body)
        tree = changed({**tree, MANIFEST: json.dumps(body, indent=1).encode()}, of_manifest)
    return {**tree, MANIFEST: _with_digest(tree[MANIFEST])} if MANIFEST in tree else tree


def _with_version_files(tree: Tree, body: dict[str, Any]) -> Tree:
    """The pack with files of versions that are named by what they contain now; the manifest states their digests."""
    tree, files = dict(tree), {name: data for name, data in tree.items() if name.startswith(f"pack/{keys.VERSIONS}/")}
    for history in body.get("histories", {}).values():
        bundle = history["shared_fields"].get("bundle")
        data = files.get(name := f"pack/{keys.version_file(bundle)}") if bundle is not None else None
        if isinstance(data, bytes):
            tree.pop(name)
            history["shared_fields"]["bundle"] = atomic_files.digest(data)
            tree[f"pack/{keys.version_file(atomic_files.digest(data))}"] = data
            for entry in history["versions"]:
                if "offset" in entry:
                    fields = {**history["shared_fields"], **entry}
                    end = entry["offset"] + fields["lora_bytes"] + fields["tensor_bytes"]
                    entry["sha256"] = atomic_files.digest(data[entry["offset"] : end])
        for entry in history["versions"]:
            data = files.get(name := f"pack/{keys.version_file(entry['sha256'])}")
            if isinstance(data, bytes):
                tree.pop(name, None)
                entry["sha256"] = atomic_files.digest(data)
                tree[f"pack/{keys.version_file(entry['sha256'])}"] = data
    return tree


def _with_digest(manifest: bytes | Special) -> bytes | Special:
    """A manifest with the digest of itself, where it can have one."""
    try:
        text = manifest.decode() if isinstance(manifest, bytes) else ""
        canonical = json.dumps(json.loads(text), indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (ValueError, RecursionError):
        return manifest
    if not text.startswith("{\n"):
        return manifest
    return f'{{"digest": "{atomic_files.digest(canonical.encode())}",{text[1:]}'.encode()


def _with_fingerprints(tree: Tree, of_manifest: list[Change]) -> Tree:
    """The pack with the fingerprints that its rows have, in the place of those that they had; as it is where its rows
    cannot be read at all."""
    found: list[Subspace] = []
    try:
        manifest = tree[MANIFEST]
        body = json.loads(manifest if isinstance(manifest, bytes) else b"")
        stated = [
            *(step.get("fingerprint") for step in body["subspace"].get("growth", ())),
            body["subspace"]["fingerprint"],
        ]
        rows = tree[f"pack/{body['subspace']['file']}"]
        body.pop("digest", None)
        now = _with_digest(changed({MANIFEST: json.dumps(body, indent=1).encode()}, of_manifest)[MANIFEST])
        assert isinstance(now, bytes)
        assert isinstance(rows, bytes)
        with patch.object(subspace_file, "_check_lineage", lambda subspace, *_: found.append(subspace)):
            subspace_file.from_bytes(rows, manifest_json.parse(now, Path(MANIFEST)), Path(MANIFEST))
    except Exception:  # noqa: BLE001
        # what it is that is wrong is for the reader to say
        if not found:
            return tree
    # the formats before 3 state the last one alone
    for old, new in zip(reversed(stated), reversed(found[0].lineage), strict=False):
        if old is not None and old != new:
            tree = changed(tree, [Change("pack/*.json", "text", (old, new))])
    return tree


def _draw_manifest(random: Random, tree: Tree) -> list[Change]:
    return mutations.draw(random, tree, [MANIFEST])


def _draw_versions(random: Random, tree: Tree) -> list[Change]:
    files = sorted(name for name in tree if name.startswith(f"pack/{keys.VERSIONS}/"))
    return mutations.draw(random, tree, random.choice((files, files, [MANIFEST])))


def _draw_pack_files(random: Random, tree: Tree) -> list[Change]:
    if random.random() < 0.3:
        return mutations.consistent(random, tree)
    files = sorted(name for name in tree if name != MANIFEST and not name.endswith(keys.CARD))
    # most of the files are the adapters'
    bases = [name for name in files if f"/{keys.ADAPTERS}/" not in name]
    return mutations.draw(random, tree, random.choice((files, files, bases)))


def read_pack(folder: Path) -> int:
    """Open a pack, read all that it says of itself, and export every adapter, whatever is wrong with the others."""
    pack = ex.Pack.open(folder / "pack")
    first: EigenloraxError | None = None
    largest = 0
    for call in (
        pack.verify,
        lambda: pack.subspace,
        lambda: repr((pack, pack.names, pack.summary, pack.records, pack.aim)),
    ):
        try:
            call()
        except EigenloraxError as error:
            first = first or error
    versions = [history.full_name(record) for history in pack.histories.values() for record in history]
    for name in (*pack.names, *versions):
        try:
            pack.digest(name)
            (path,) = pack.export(folder / "out", name).values()
            largest = max(largest, sum(one.stat().st_size for one in ([*path.iterdir()] if path.is_dir() else [path])))
            _check_reads_again(path)
        except EigenloraxError as error:
            first = first or error
    if first is not None:
        raise first
    return largest


def _check_reads_again(path: Path) -> None:
    """`WrongError` where what was exported cannot be read; its numbers may be as large as their dtype allows."""
    try:
        adapter = ex.read_adapter(path)
        for tensors in (adapter.modules, adapter.heads, adapter.carried):
            for name in tensors:
                tensors[name]
    except EigenloraxError as error:
        raise WrongError(f"what was exported cannot be read: {type(error).__name__}: {error}") from error


# Adapters: read, written again, and some of them put into a pack.


def _draw_config(random: Random, tree: Tree) -> list[Change]:
    return mutations.draw(random, tree, [f"one/{keys.ADAPTER_CONFIG}"])


def _draw_tensors(random: Random, tree: Tree) -> list[Change]:
    return mutations.draw(random, tree, [f"one/{keys.ADAPTER_WEIGHTS}"])


def _draw_coefficients(random: Random, tree: Tree) -> list[Change]:
    return mutations.draw(random, tree, sorted(name for name in tree if name.startswith("one/")))


def _draw_file(random: Random, tree: Tree) -> list[Change]:
    return mutations.draw(random, tree, sorted(tree))


def _draw_pickle(random: Random, tree: Tree) -> list[Change]:
    name = f"one/{keys.ADAPTER_PICKLE}"
    data = tree[name]
    assert isinstance(data, bytes)
    return [mutations.plain_bytes(random, name, data) for _ in range(random.choice((1, 1, 3)))]


def _draw_specials(random: Random, tree: Tree) -> list[Change]:
    return [mutations.special(random, tree) for _ in range(random.choice((1, 1, 2)))]


def read_adapter(folder: Path) -> int:
    """Read an adapter in whatever form it came, write it, and read that; and put it into a pack of its own."""
    sources = [path for path in (folder / "one", folder / "one.safetensors") if path.exists() or path.is_symlink()]
    adapter = ex.read_adapter(sources[0] if sources else folder / "one", allow_pickle=True)
    checks.scan(adapter)
    path = ex.write_adapter(adapter, folder / "again")
    _check_reads_again(path)
    ex.fit([adapter], n_components=2, solver="exact").save(folder / "pack of one")
    try:
        (path,) = ex.Pack.open(folder / "pack of one").export(folder / "out").values()
    except PackError as error:
        raise WrongError(f"what came into a pack does not come out: {error}") from error
    _check_reads_again(path)
    return sum(one.stat().st_size for one in ([*path.iterdir()] if path.is_dir() else [path]))


def _draw_gguf(random: Random, tree: Tree) -> list[Change]:
    """Changes of the header for the most part, where the counts, types and places of tensors are."""
    if random.random() < 0.2:
        return mutations.draw(random, tree, ["base/config.json"])
    data = tree["one.gguf"]
    assert isinstance(data, bytes)
    header = data[: data.rindex(b".lora_b") + 60] if random.random() < 0.8 else data
    return [mutations.plain_bytes(random, "one.gguf", header) for _ in range(random.choice((1, 1, 1, 2, 3)))]


def read_gguf(folder: Path) -> int:
    """Read a LoRA of llama.cpp, write it in that format and as PEFT's, and read those."""
    base = folder / "base"
    adapter = ex.read_adapter(folder / "one.gguf", base_config=base)
    checks.scan(adapter)
    path = ex.write_adapter(adapter, folder / "again", format="gguf", base_config=base)
    try:
        ex.read_adapter(path, base_config=base)
    except EigenloraxError as error:
        raise WrongError(f"what was written cannot be read: {type(error).__name__}: {error}") from error
    _check_reads_again(ex.write_adapter(adapter, folder / "out"))
    return path.stat().st_size


def read_coefficients(folder: Path) -> int:
    """Read an adapter that was trained on coefficients beside the pack whose subspace they are of."""
    ex.Pack.open(folder / "pack")
    adapter = ex.read_adapter(folder / "one")
    checks.scan(adapter)
    _check_reads_again(ex.write_adapter(adapter, folder / "again"))
    return 0


def find_adapters(folder: Path) -> int:
    """Look for adapters in a folder and make a pack of them."""
    ex.fit(folder, n_components=2, solver="exact").save(folder / "pack of all")
    return 0


# Rows, reports, checkpoints, and the command.


def read_rows(folder: Path) -> int:
    """Read a file of rows as `train` and `evaluate` do."""
    (path,) = sorted(folder.iterdir()) or [folder / "rows.csv"]
    table = rows.read(path)
    rows.rows_sha256(table)
    columns = Columns("text", "label", None)
    rows.column_texts(table, "text", "--text-column")
    labels = rows.infer_labels(table, columns)
    labels.encode(table, columns)
    rows.first_name(table, columns)
    return 0


def read_report(folder: Path) -> int:
    """Read a report and write it as text and as JSON, which is the same report again."""
    report = ex.Report.load(folder / "report.json")
    report.save(folder / "again.md")
    report.save(folder / "again.json")
    again = ex.Report.load(folder / "again.json")
    if json_document.to_json(again) != json_document.to_json(report):
        raise WrongError("a report that was written is another one when it is read")
    with _output(io.BytesIO(), io.BytesIO()):
        print_verdict(report)
    return 0


def read_page(folder: Path) -> int:
    """Read a report and write its page, which takes longer: it has pictures."""
    ex.Report.load(folder / "report.json").save(folder / "again.html")
    return 0


def _draw_report(random: Random, tree: Tree) -> list[Change]:
    return mutations.draw(random, tree, ["report.json"])


def resume(folder: Path) -> int:
    """Go on with a fit that was interrupted; the pack is that of a fit that was not."""
    text = (folder / starts.OPTIONS).read_text("utf-8")
    ex.fit(folder / "in", checkpoint=folder / "kept", **json.loads(text)).save(folder / "pack")
    if starts.tree_of(folder / "pack") != starts.whole_packs()[text]:
        raise WrongError("the pack of a resumed fit is another one")
    return 0


def _draw_checkpoint(random: Random, tree: Tree) -> list[Change]:
    files = {name: data for name, data in sorted(tree.items()) if name.startswith("kept/")}
    kind = random.random()
    if kind < 0.1:
        return [mutations.special(random, files)]
    name, other = (random.choice(list(files)) for _ in range(2))
    if kind < 0.2:
        return [Change(name, "as", (other,))]
    data = files[name]
    assert isinstance(data, bytes)
    return [mutations.plain_bytes(random, name, data) for _ in range(random.choice((1, 1, 2)))]


VERBS = (
    "inspect pack",
    "inspect pack --json",
    "inspect one",
    "export pack -o out",
    "export pack a -o out --dtype float16",
    "export pack a -o out --format kohya",
    "convert one out --to peft",
    "convert one out --to mlx",
    "report pack",
    "report pack --json",
    "report pack -o out.md",
    "remove pack a",
    "augment pack --n-extra 1 --seed 3 -o out",
    "refit pack -k 2 -o out",
    "find pack words",
    "find pack --like one",
    "add pack one",
    "add pack one --extend 1",
    "fit one -o out -k 2 --no-report",
    "fit . -o out -k 2 --no-report --skip-bad",
)
OF_HISTORIES = (
    "inspect pack",
    "log pack run",
    "log pack run --json",
    "diff pack run@20 run@latest",
    "diff pack exact@0 exact@3 --json",
    "export pack run@latest exact@1 -o out --dtype float32",
    "prune pack run --keep-last 1",
    "prune pack exact --keep-every 2 --json",
    "remove pack run@20",
    "find pack run --json",
    "restore pack exact@3 -o out",
)
"""Verbs of a pack with the histories `run` and `exact`, the latter of which has lossless versions."""


def _draw_command(random: Random, tree: Tree) -> list[Change]:
    has_histories = any(name.startswith(f"pack/{keys.VERSIONS}/") for name in tree)
    verb = Change(starts.COMMAND, "create", (random.choice(OF_HISTORIES if has_histories else VERBS),))
    if random.random() < 0.15:
        return [verb, mutations.special(random, {name: data for name, data in tree.items() if name != starts.COMMAND})]
    files = sorted(name for name in tree if not name.endswith((keys.CARD, starts.COMMAND)))
    return [verb, *mutations.draw(random, tree, random.choice((files, [MANIFEST, "pack/report.json"])))]


def run_command(folder: Path) -> int:
    """Run a verb of the command; what it prints is text, and what it leaves with is its own."""
    arguments = (folder / starts.COMMAND).read_text("utf-8").split()
    out, err, code = io.BytesIO(), io.BytesIO(), None
    with _current(folder), _output(out, err):
        try:
            main(arguments)
        except SystemExit as left:
            code = left.code or 0
    shown, said = out.getvalue().decode(), err.getvalue().decode()
    if code not in EXIT_CODES:
        raise WrongError(f"`{' '.join(arguments)}` left with {code}: {said[-300:]}")
    if "Traceback" in said:
        raise WrongError(f"`{' '.join(arguments)}` has printed a traceback: {said[-300:]}")
    if control := next((one for one in shown + said if _is_control(one)), None):
        raise WrongError(f"`{' '.join(arguments)}` has printed the control character {control!r}")
    if code and len(said) > 10 * MAX_MESSAGE:
        raise WrongError(f"`{' '.join(arguments)}` has printed an error of {len(said):,} characters")
    if code:
        raise CommandRefusedError
    return 0


class CommandRefusedError(EigenloraxError):
    """The command has left with an error of ours."""


def _is_control(character: str) -> bool:
    """Whether a terminal may take a character for a command: a control, or a mark that changes the direction."""
    kind = unicodedata.category(character)
    return (kind == "Cc" and character not in "\n\t") or unicodedata.bidirectional(character) in _DIRECTIONS


_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@contextmanager
def _current(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _output(out: io.BytesIO, err: io.BytesIO) -> Iterator[None]:
    """Standard output and errors, kept in memory."""
    before = sys.stdout, sys.stderr
    streams = io.TextIOWrapper(out, "utf-8"), io.TextIOWrapper(err, "utf-8")
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            stream.detach()


TARGETS: Mapping[str, Target] = {
    one.name: one
    for one in (
        Target("manifest", starts.packs, _draw_manifest, read_pack, 24, signed),
        Target("pack", starts.packs, _draw_pack_files, read_pack, 30, signed),
        Target("versions", starts.histories, _draw_versions, read_pack, 10, signed),
        Target("pack-special", starts.packs, _draw_specials, read_pack, 3, signed),
        Target("config", starts.adapters, _draw_config, read_adapter, 10),
        Target("tensors", starts.adapters, _draw_tensors, read_adapter, 10),
        Target("coefficients", starts.coefficients, _draw_coefficients, read_coefficients, 6),
        Target("image", starts.images, _draw_file, read_adapter, 10),
        Target("mlx", starts.mlx, _draw_file, read_adapter, 6),
        Target("gguf", starts.gguf, _draw_gguf, read_gguf, 6),
        Target("pickle", starts.pickles, _draw_pickle, read_adapter, 3),
        Target("collection", starts.collections, _draw_specials, find_adapters, 3),
        Target("rows", starts.rows, _draw_file, read_rows, 4),
        Target("report", starts.reports, _draw_report, read_report, 4),
        Target("page", starts.reports, _draw_report, read_page, 1, seconds=10.0),
        Target("checkpoint", starts.checkpoints, _draw_checkpoint, resume, 3),
        Target("command", starts.commands, _draw_command, run_command, 6, signed),
    )
}
