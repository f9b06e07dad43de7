"""Verbs that write, killed at a random moment and run again: what is there in between, and what is there in the end.

`test_crash.py` has some cases of it, `scripts/crash-test` as many as are asked for.
"""

import io
import os
import random
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from safetensors.torch import save as to_safetensors

import children
import eigenlorax as ex
import gguf_models
import lora_files
from adapters import make_adapter
from children import Done, at_change, changes_within
from eigenlorax.cli import main
from eigenlorax.core import keys
from eigenlorax.core.atomic_files import STAGING_PREFIX
from eigenlorax.errors import DuplicateAdapterWarning
from outcomes import contents
from runs import make_run, tensors_of, write_states

VERBS = {
    "add": "add {pack} {sources}/delta zeta={sources}/gamma --warn-above 1",
    "extend": "add {pack} {sources}/delta --extend 1 --warn-above 1",
    "remove": "remove {pack} beta",
    "remove a parent": "remove {place}/coded alpha",
    "add a reference": "add {place}/coded zeta={sources}/beta --warn-above 1",
    "refit": "refit {pack} -o {pack} -k 3 --warn-above 1 --overwrite",
    "augment": "augment {pack} --n-extra 2 --seed 7 -o {place}/fresh",
    "augment in place": "augment {pack} --n-extra 2 --seed 7 -o {pack} --overwrite",
    "fit": "fit {sources} -o {place}/fresh -k 3 --warn-above 1 --no-report",
    "fit in place": "fit {sources} -o {pack} -k 3 --warn-above 1 --no-report --overwrite",
    "fit members": "fit {run}/checkpoint-20 --reference {run}/checkpoint-10 -o {place}/fresh",
    "fit with a basis": "fit {sources} -o {place}/fresh --max-error 0.4 --basis 3 --warn-above 1 --no-report",
    "add beside a basis": "add {place}/based {sources}/delta --warn-above 1",
    "augment a basis in place": "augment {place}/based --n-extra 2 --seed 7 -o {place}/based --overwrite",
    "refit another basis": "refit {place}/based -o {place}/based --basis 2 --warn-above 1 --overwrite",
    "fit for bytes": "fit {sources} -o {place}/some/where --ratio 4 --warn-above 1 --no-report",
    "report": "report {pack} -a {sources} -o {pack}/report.json -o {place}/r/report.md",
    "export": "export {pack} -o {place}/fresh",
    "export in place": "export {pack} -o {place}/loras --overwrite",
    "export files": "export {place}/styles -o {place}/fresh",
    "export files in place": "export {place}/styles -o {place}/files --overwrite",
    "export as mlx": "export {place}/texts -o {place}/fresh --format mlx",
    "export as gguf": "export {place}/texts -o {place}/fresh --format gguf --base-config {base}",
    "export as gguf in place": "export {place}/texts -o {place}/files --format gguf --base-config {base} --overwrite",
    "convert": "convert {place}/files/f.gguf {place}/fresh --to mlx --base-config {base}",
    "convert in place": "convert {place}/files/f.gguf {place}/files/german --to mlx --base-config {base} --overwrite",
    "export a version": "export {place}/runs run@20 -o {place}/fresh",
    "merge": "merge {pack} alpha beta -o {place}/fresh",
    "merge in place": "merge {pack} alpha beta -o {place}/loras/alpha --overwrite",
    "remove a version": "remove {place}/runs run@20",
    "track": "track {run} -o {place}/runs",
    "prune": "prune {place}/runs run --keep-last 1 --keep-every 20",
    "restore": "restore {place}/runs run@latest -o {place}/fresh",
}
"""Commands on the folder `place`, where there are packs and exports of them already. A new verb is one more line."""


def append_versions(place: Path, runs: Path) -> None:
    """Append two versions, which are saved together."""
    with ex.Pack.edit(place / "runs") as pack:
        for step, lossless in ((50, True), (60, False)):
            pack.append(runs / "run" / f"checkpoint-{step}", lossless=lossless)


def prune(place: Path, runs: Path) -> None:
    """Prune a history, so that a version is encoded again."""
    with ex.Pack.edit(place / "runs") as pack:
        pack.prune("run", keep_last=1, keep_every=20)


def remove_versions(place: Path, runs: Path) -> None:
    """Remove the first version of a history, and another history."""
    with ex.Pack.edit(place / "runs") as pack:
        pack.remove("run@10", "other")


def append_member(place: Path, runs: Path) -> None:
    """Append a member to a population."""
    with ex.Pack.edit(place / "users") as pack:
        pack.append(runs / "run" / "checkpoint-50", "new", name="members")


def remove_member(place: Path, runs: Path) -> None:
    """Remove a member of a population."""
    with ex.Pack.edit(place / "users") as pack:
        pack.remove("members@a")


CALLS: dict[str, Callable[[Path, Path], None]] = {
    "Pack.append": append_versions,
    "Pack.prune": prune,
    "Pack.remove": remove_versions,
    "Pack.append of a member": append_member,
    "Pack.remove of a member": remove_member,
}
"""What Python can do without a verb: functions of the folder `place`, and of a folder with the checkpoints of a run."""
NOT_KILLED = {
    "inspect": "reads",
    "log": "reads",
    "diff": "writes one file as `report` does",
    "evaluate": "reads",
    "find": "writes into the user's cache alone, one file at a time",
    "serve-check": "reads",
    "env": "reads",
    "push": "writes on the Hub alone, by one request",
    "pull": "saves a pack as `augment` does; the rest is the Hub's library",
    "train": "adds an adapter as `add` does; the rest is the Trainer of transformers",
    "compare": "writes one file as `report` does, after each training",
    "app": "saves packs in a temporary folder",
    "demo": "fits and exports as those do",
}
"""Verbs of the command that are not among them, and why."""

MODULES = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (19, 768),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (13, 11),
}
EXISTS = 4


@dataclass(frozen=True)
class Crash:
    """When a verb is killed: `delay` seconds after it has come to its n-th change on the disk, or just before that."""

    verb: str
    change: int
    delay: float | None


class Crashes:
    """What the verbs make where nothing disturbs them, and a folder for those that are killed."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._sources = scratch / "sources"
        self._before = scratch / "before"
        self._place = scratch / "work" / "place"
        self._make()
        self._old = contents(self._before)
        before = ex.Pack.open(self._before / "runs")
        self._versions = {
            name: digest_of(before[name])
            for history in before.histories.values()
            for name in map(history.full_name, history)
        }
        self._new: dict[str, dict] = {}
        self._new_versions: dict[tuple[str, str], str] = {}
        self._changes: dict[str, int] = {}

    def draw(self, number: int, seed: int, verbs: Sequence[str] = (*VERBS, *CALLS)) -> Iterator[Crash]:
        """Cases by chance, the same for the same seed: each verb as often as the others, half of them at a change."""
        drawn = random.Random(seed)
        for n in range(number):
            verb = verbs[n % len(verbs)]
            self._run_undisturbed(verb)
            change = drawn.randint(1, self._changes[verb])
            yield Crash(verb, change, drawn.uniform(0, 0.01) if (n // len(verbs)) % 2 else None)

    def run(self, crash: Crash) -> str:
        """Kill a verb and run it again; what was there in between: `old`, `new` or `between`.

        `AssertionError` where anything is neither old nor new, or the end is not what an undisturbed run makes.
        """
        self._run_undisturbed(crash.verb)
        new = self._new[crash.verb]
        self._copy()
        done = self._fork(crash.verb, partial(at_change, crash.change, self._place, _killer(crash.delay)))
        assert done.code in (-signal.SIGKILL, 0), (crash, done)
        found = contents(self._place)
        self._check(found, new, crash)
        self._finish(crash, found, new)
        end = contents(self._place)
        assert end == new, (crash, _differing(end, new))
        return "old" if found == self._old else "new" if found == new else "between"

    def _make(self) -> None:
        for seed, name in enumerate(("alpha", "beta", "gamma", "delta"), start=1):
            make_adapter(self._sources / name, seed=seed, head=(2, 31) if name == "beta" else None)
        some = [self._sources / name for name in ("alpha", "beta")]
        pack = ex.fit(some, n_components=4, warn_above=1.0)
        pack.save(self._before / "pack")
        pack.export(self._before / "loras", dtype="float16")
        (self._before / "pack" / keys.REPORT_PAGE).write_bytes(
            b"Made by eigenlorax 0 from the subspace of fingerprint 0"
        )
        with warnings.catch_warnings(action="ignore", category=DuplicateAdapterWarning):
            copies = {"alpha": some[0], "beta": some[1], "copy": some[0], "other": some[0]}
            ex.fit(copies, max_error=0.3, warn_above=1.0).save(self._before / "coded")
        ex.fit(some, max_error=0.3, basis=3, warn_above=1.0).save(self._before / "based")
        styles = self._scratch / "images"
        styles.mkdir()
        for seed in range(2):
            lora_files.write(styles / f"s{seed}.safetensors", lora_files.planted(MODULES, seed=seed), "kohya")
        images = ex.fit(styles, n_components=4, warn_above=1.0)
        images.save(self._before / "styles")
        images.export(self._before / "files", dtype="float16")
        self._make_texts()
        checkpoints = make_run(self._scratch / "trained" / "run", range(10, 70, 10))
        # with one checkpoint that is not in the history
        longer = shutil.copytree(self._scratch / "trained" / "run", self._scratch / "longer" / "run")
        shutil.rmtree(longer / checkpoints[-1].name)
        write_states([longer / checkpoint.name for checkpoint in checkpoints[:-1]], max_steps=60)
        histories = ex.Pack.empty()
        for name in ("run", "other"):
            for number, checkpoint in enumerate(checkpoints[:4]):
                histories.append(checkpoint, name=name, lossless=number == 3)
        histories.save(self._before / "runs")
        members = {"a": checkpoints[1], "b": checkpoints[2]}
        ex.fit(members, reference=checkpoints[0]).save(self._before / "users")

    def _make_texts(self) -> None:
        """Make a pack of a language model's adapters, and files of two: in GGUF, and of mlx-lm."""
        gguf_models.write_config(self._scratch / "base")
        texts = [gguf_models.adapter(name=name, rank=rank) for name, rank in (("french", 3), ("german", 2))]
        ex.fit(texts, n_components=4, warn_above=1.0).save(self._before / "texts")
        french = self._before / "files" / "f"
        ex.write_adapter(texts[0], french, format="gguf", dtype="float16", base_config=self._scratch / "base")
        ex.write_adapter(texts[1], self._before / "files" / "german", format="mlx")

    def _copy(self) -> None:
        shutil.rmtree(self._place.parent, ignore_errors=True)
        self._place.parent.mkdir()
        shutil.copytree(self._before, self._place)

    def _arguments(self, verb: str) -> list[str]:
        pack = self._place / "pack"
        run = self._scratch / "longer" / "run"
        return (
            VERBS[verb]
            .format(place=self._place, pack=pack, sources=self._sources, run=run, base=self._scratch / "base")
            .split()
        )

    def _fork(self, verb: str, prepare: Callable[[], object] = int, more: tuple[str, ...] = ()) -> Done:
        def run() -> None:
            prepare()
            self._perform(verb, more)

        return children.run(run)

    def _perform(self, verb: str, more: tuple[str, ...] = ()) -> None:
        if verb in CALLS:
            CALLS[verb](self._place, self._scratch / "trained")
        else:
            main([*self._arguments(verb), *more])

    def _run_undisturbed(self, verb: str) -> None:
        """Note what a verb makes, and in how many changes."""
        if verb in self._new:
            return
        # once in this process, so that the others need not import what it does
        for run in (self._here, self._counted):
            self._copy()
            done = run(verb)
            assert done.code == 0, done
        self._new[verb], self._changes[verb] = contents(self._place), int(done.err.rpartition("changes: ")[2])
        assert self._new[verb] != self._old

    def _here(self, verb: str) -> Done:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                self._perform(verb)
            except SystemExit as left:
                return Done(int(left.code or 0), out.getvalue(), err.getvalue())
        assert verb in CALLS, "a command ends by leaving"
        return Done(0, out.getvalue(), err.getvalue())

    def _counted(self, verb: str) -> Done:
        def run() -> None:
            seen = []
            sys.addaudithook(lambda event, given: changes_within(self._place, event, given) and seen.append(event))
            try:
                self._perform(verb)
            finally:
                sys.stderr.write(f"changes: {len(seen)}")

        return children.run(run)

    def _check(self, found: dict, new: dict, crash: Crash) -> None:
        """Whether each pack, adapter and file is the old one or the new one."""
        packs = _folders(keys.MANIFEST, self._old, new)
        adapters = [path for path in _folders(keys.ADAPTER_CONFIG, self._old, new) if _above(path, packs) is None]
        for pack in packs:
            path = f"{pack}/{keys.MANIFEST}"
            assert found.get(path) in (self._old.get(path), new[path]), (crash, path)
            if path in found:
                opened = ex.Pack.open(self._place / pack)
                opened.verify()
                for name in opened.names:
                    opened.packed(name)
                self._check_versions(opened, crash)
        for adapter in adapters:
            there, before, after = (_below(adapter, one) for one in (found, self._old, new))
            assert there in (before, after), (crash, adapter)
        for path in self._old.keys() | found.keys() | new.keys():
            ours = path.rpartition("/")[2].startswith(STAGING_PREFIX) or STAGING_PREFIX in path or ".fitting" in path
            if not ours and _above(path, [*packs, *adapters]) is None and path not in (*packs, *adapters):
                assert found.get(path) in (self._old.get(path), new.get(path)), (crash, path)

    def _check_versions(self, opened: ex.Pack, crash: Crash) -> None:
        """Whether each version that was there has the same numbers, and a new one those that this verb makes."""
        for history in opened.histories.values():
            for record in history:
                name = history.full_name(record)
                digest = digest_of(opened[name])
                before = self._versions.get(name) or self._new_versions.setdefault((crash.verb, name), digest)
                assert digest == before, (crash, name)

    def _finish(self, crash: Crash, found: dict, new: dict) -> None:
        """Run a killed verb again; or, where its pack is there already, write that again, as the next writer will."""
        manifests = [path for path in new if path.endswith(keys.MANIFEST) and self._old.get(path) != new[path]]
        if manifests and all(found.get(path) == new[path] for path in manifests):
            for path in manifests:
                with ex.Pack.edit((self._place / path).parent):
                    pass
            return
        done = self._fork(crash.verb)
        if done.code == EXISTS and "--overwrite" not in VERBS.get(crash.verb, ""):
            # some of what it writes is there already
            done = self._fork(crash.verb, more=("--overwrite",))
        assert done.code == 0, (crash, done)


def digest_of(adapter: ex.Adapter) -> str:
    """A digest of the numbers of an adapter."""
    tensors = {key: tensor.contiguous() for key, tensor in sorted(tensors_of(adapter).items())}
    return sha256(to_safetensors(tensors)).hexdigest()


def _killer(delay: float | None) -> Callable[[], object]:
    """What kills this process, now or after some time in which it goes on."""

    def happen() -> None:
        # of the fork that it happens in
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        if delay is None:
            kill()
        else:
            threading.Timer(delay, kill).start()

    return happen


def _folders(file: str, *states: dict) -> list[str]:
    """The folders that have a file of this name in one of the states."""
    return sorted({path.rpartition("/")[0] for state in states for path in state if path.rpartition("/")[2] == file})


def _above(path: str, folders: list[str]) -> str | None:
    return next((folder for folder in folders if path.startswith(f"{folder}/")), None)


def _below(folder: str, state: dict) -> dict:
    return {path: data for path, data in state.items() if path.startswith(f"{folder}/")}


def _differing(one: dict, other: dict) -> list[str]:
    return sorted(path for path in one.keys() | other.keys() if one.get(path, 0) != other.get(path, 0))
