"""Inputs that are right, from which hostile ones are made: small, one of each kind of file that is read."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

import eigenlorax as ex
import lora_files
import rests
import versions
from adapters import change_config, make_adapter
from eigenlorax import keys
from eigenlorax.errors import EigenloraxWarning
from planted import random_collection
from reports import synthetic

from .changes import Tree, write

MODULES = {"encoder.0.query": (17, 11), "encoder.1.value": (13, 19)}
"""(out, in) of each; few, so that a case takes milliseconds."""
QUERY, VALUE = MODULES
CONVOLUTION = {"conv.0": (7, 5, 3, 3)}
UNET = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (19, 768),
    "unet.mid_block.attentions.0.proj_in": (7, 5, 1, 1),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (13, 11),
}
WEIGHTS = keys.ADAPTER_WEIGHTS


def tree_of(folder: Path, *parts: str) -> Tree:
    """All files of a folder, or of some things in it; locks aside, which are empty."""
    paths = [path for part in parts or (".",) for path in [folder / part, *(folder / part).rglob("*")]]
    files = [path for path in sorted(paths) if path.is_file() and path.name != keys.LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _made(make: Callable[[Path], None]) -> Tree:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", EigenloraxWarning)
        make(Path(folder))
        return tree_of(Path(folder))


@cache
def packs() -> Mapping[str, Tree]:
    """A pack of each storage and of each kind of adapter, and of each version of the format."""
    floats = {name: _pack(dtype=name) for name in ("float32", "float16")}
    return {
        **floats,
        "int8": _pack(dtype="int8"),
        "int4": _pack(dtype="int4"),
        "coded": _pack(max_error=0.3, n_components=None),
        "full": _pack(cores="full"),
        "diagonal": _pack(cores="diagonal", dtype="float16"),
        "augmented": _pack(change=lambda pack: pack.augment(2, 7)),
        "coded augmented": _pack(max_error=0.3, n_components=None, change=lambda pack: pack.augment(2, 7)),
        "extended": _pack(change=_extended),
        "int8 extended": _pack(dtype="int8", change=_extended),
        "rests": _pack(change=lambda pack: rests.with_rests(pack, {"a0": ["both"], "a1": ["down", "up"]})),
        "folders": _made(_pack_of_folders),
        "image": _made(_pack_of_files),
        **{f"version {number}": _made(lambda folder, number=number: _older(folder, number)) for number in (1, 2, 3, 4)},
    }


def _pack(change: Callable[[ex.Pack], ex.Pack] = lambda pack: pack, **options: object) -> Tree:
    def make(folder: Path) -> None:
        collection = random_collection(2, modules=MODULES)
        pack = change(
            ex.fit(
                collection,
                **{"n_components": 3, "solver": "exact", **options} if "max_error" not in options else options,
            )
        )
        pack.save(folder / "pack")

    return _made(make)


def _extended(pack: ex.Pack) -> ex.Pack:
    pack.add(random_collection(3, modules=MODULES)[2], name="late", extend=1)
    return pack


def _pack_of_folders(folder: Path) -> None:
    """With a head, with tensors that are carried, with patterns and metadata."""
    pack = ex.fit(list(_adapter_folders(folder).values()), n_components=3, exclude_modules=VALUE)
    pack.save(folder / "pack")
    _remove_all_but(folder, "pack")


def _pack_of_files(folder: Path) -> None:
    for dialect in ("kohya", "diffusers"):
        lora_files.write(folder / f"{dialect}.safetensors", lora_files.planted(UNET, seed=1), dialect)
    ex.fit([folder / f"{dialect}.safetensors" for dialect in ("kohya", "diffusers")], n_components=2).save(
        folder / "pack"
    )
    _remove_all_but(folder, "pack")


def _older(folder: Path, version: int) -> None:
    pack = ex.fit(random_collection(2, modules=MODULES), n_components=3)
    (pack.augment(2, 7) if version < 3 else pack).save(folder / "pack")
    versions.write_older(folder / "pack", version)


def _remove_all_but(folder: Path, kept: str) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.relative_to(folder).parts[0] != kept:
            path.rmdir() if path.is_dir() else path.unlink()


def _adapter_folders(folder: Path) -> dict[str, Path]:
    plain = make_adapter(folder / "plain", seed=1, modules=MODULES)
    patterns = make_adapter(folder / "patterns", seed=2, modules=MODULES)
    change_config(
        patterns,
        r=8,
        rank_pattern={QUERY: 3, rf"^{VALUE}$".replace(".", r"\."): 3, "other.*": 5},
        alpha_pattern={"value": 9},
        use_rslora=True,
    )
    head = make_adapter(
        folder / "head",
        seed=3,
        modules=MODULES,
        head=(2, 31),
        tensors={
            f"base_model.model.{VALUE}.lora_magnitude_vector": torch.ones(13),
            "base_model.model.embed.lora_embedding_A": torch.ones(3, 40),
            "base_model.model.embed.lora_embedding_B": torch.ones(7, 3),
            "base_model.model.encoder.0.query.base_layer.bias": torch.ones(17),
        },
        config={"use_dora": True, "bias": "lora_only"},
    )
    return {"plain": plain, "patterns": patterns, "head": head}


@cache
def adapters() -> Mapping[str, Tree]:
    """Folders of adapters, as PEFT and as the paper's authors save them."""
    return {
        **{
            name: _made(lambda folder, name=name: _only(_adapter_folders, folder, name))
            for name in ("plain", "patterns", "head")
        },
        "convolution": _made(_convolution),
        "official": _made(_official),
        "metadata": _made(lambda folder: make_metadata(folder / "one")),
    }


def _only(make: Callable[[Path], dict[str, Path]], folder: Path, name: str) -> None:
    make(folder)[name].rename(folder / "one")
    _remove_all_but(folder, "one")


def make_metadata(folder: Path) -> None:
    """An adapter whose file says of itself more than its format."""
    make_adapter(folder, seed=1, modules=MODULES)
    path = folder / WEIGHTS
    tensors = ex.read_adapter(folder)
    save_file(
        {
            keys.lora_key(name, side): weight
            for name, one in tensors.modules.items()
            for side, weight in zip(keys.SIDES, one.weights, strict=True)
        },
        path,
        metadata={"format": "pt", "note": "n", "json": json.dumps({"a": [1, {"b": None}]})},
    )


def _convolution(folder: Path) -> None:
    planted = lora_files.planted(CONVOLUTION, seed=1, mixed=False)
    ex.write_adapter(planted, folder / "one")


def _official(folder: Path) -> None:
    tensors = {}
    for module, (n_out, n_in) in MODULES.items():
        for side, dimension in (("A", n_in), ("B", n_out)):
            key = f"base_model.model.{module}.eigenlora_{side}"
            tensors[f"{key}.components"], tensors[f"{key}.loadings"] = torch.ones(dimension, 5), torch.ones(5, 3)
    config = {"peft_type": "EIGENLORA", "r": 3, "lora_alpha": 7, "num_components": 5, "target_modules": ["query"]}
    (folder / "one").mkdir()
    save_file(tensors, folder / "one" / WEIGHTS)
    (folder / "one" / keys.ADAPTER_CONFIG).write_text(json.dumps(config))


@cache
def coefficients() -> Mapping[str, Tree]:
    """A pack, and beside it an adapter that was trained on coefficients in its subspace, of each storage."""
    found = {}
    for name in ("float32", "int8", "coded", "full", "diagonal", "extended"):
        pack = packs()[name]
        own = {path: data for path, data in pack.items() if path.startswith("pack/adapters/a0/")}
        config = json.loads(own[f"pack/adapters/a0/{keys.ADAPTER_CONFIG}"])
        found[name] = {
            **pack,
            f"one/{keys.ADAPTER_CONFIG}": json.dumps({**config, "subspace": "../pack"}).encode(),
            f"one/{WEIGHTS}": own[f"pack/adapters/a0/{WEIGHTS}"],
        }
    return found


@cache
def images() -> Mapping[str, Tree]:
    """LoRA files of image models, in each dialect."""
    found = {}
    for dialect in lora_files.DIALECTS:
        planted = lora_files.planted(UNET, seed=1)
        found[dialect] = _made(
            lambda folder, planted=planted, dialect=dialect: lora_files.write(
                folder / "one.safetensors", planted, dialect, metadata={"ss_note": "n", "sshs_model_hash": "0"}
            )
        )
    found["three factors"] = _file(
        {
            "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(2, 5, 1, 1),
            "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": torch.ones(2, 2, 3, 3),
            "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(7, 2, 1, 1),
            "lora_unet_mid_block_resnets_0_conv1.alpha": torch.tensor(1.0),
            "lora_unet_mid_block_resnets_0_conv1.dora_scale": torch.ones(7, 1, 1, 1),
        }
    )
    found["flux"] = _file(
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 6),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(18, 2),
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
            "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(2, 6),
            "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.ones(42, 2),
            "lora_unet_single_blocks_0_linear1.alpha": torch.tensor(2.0),
        }
    )
    return found


def _file(tensors: dict[str, torch.Tensor]) -> Tree:
    return _made(lambda folder: save_file(tensors, folder / "one.safetensors"))


@cache
def rows() -> Mapping[str, Tree]:
    """Rows to train on, in each format of text."""
    texts = [("a text", "yes"), ("another, with a comma", "no"), ('a "quoted" one\nof two lines', "yes")]
    objects = [{"text": text, "label": label, "n": number} for number, (text, label) in enumerate(texts)]
    numbered = "\n".join(json.dumps({"text": "t", "label": number % 2}) for number in range(4))
    table = "text,label\n" + "".join('"{}",{}\n'.format(text.replace('"', '""'), label) for text, label in texts)
    return {
        "lines": {"rows.jsonl": "\n".join(map(json.dumps, objects)).encode()},
        "numbers": {"rows.ndjson": numbered.encode()},
        "table": {"rows.csv": table.encode()},
        "numbered table": {"rows.csv": b"text,label\na,0\nb,1\nc,0\n"},
    }


@cache
def reports() -> Mapping[str, Tree]:
    """Reports as JSON: with every field filled, and of a pack, without originals."""

    def make(folder: Path) -> None:
        synthetic.report(4, layers=2, width=40, k=4).save(folder / "report.json")

    bare = _made(lambda folder: ex.report(_reopened(folder, packs()["float32"])).save(folder / "report.json"))
    return {"full": _made(make), "bare": {"report.json": bare["report.json"]}}


def _reopened(folder: Path, tree: Tree) -> ex.Pack:
    write(tree, folder / "input")
    (folder / "input" / "pack").rename(folder / "pack")
    (folder / "input").rmdir()
    return ex.Pack.open(folder / "pack")


OPTIONS = "options.json"
"""What a fit was asked for."""


class _StopError(Exception):
    """An end of a fit before its last module."""


def _stop(stage: str, done: int, total: int) -> None:
    if stage == "fitting modules" and done == total:
        raise _StopError


@cache
def checkpoints() -> Mapping[str, Tree]:
    """Adapters, and what a fit that was interrupted has kept of them."""

    def make(folder: Path, options: str) -> None:
        (folder / OPTIONS).write_text(options)
        for seed in (1, 2, 3):
            make_adapter(folder / "in" / f"a{seed}", seed=seed, modules=MODULES)
        with suppress(_StopError):
            ex.fit(folder / "in", checkpoint=folder / "kept", progress=_stop, **json.loads(options))

    return {options: _made(lambda folder, options=options: make(folder, options)) for options in _CHECKPOINT_OPTIONS}


_CHECKPOINT_OPTIONS = tuple(
    json.dumps({"n_components": 3, **more}) for more in ({}, {"dtype": "int8"}, {"cores": "diagonal"})
)


@cache
def whole_packs() -> Mapping[str, Tree]:
    """The packs of the same fits without an interruption, by their options."""

    def make(folder: Path, tree: Tree, options: str) -> None:
        write(tree, folder / "input")
        ex.fit(folder / "input" / "in", **json.loads(options)).save(folder / "pack")
        shutil.rmtree(folder / "input")

    return {
        options: _made(lambda folder, tree=tree, options=options: make(folder, tree, options))
        for options, tree in checkpoints().items()
    }


@cache
def special_adapters() -> Mapping[str, Tree]:
    """Folders with adapters in all forms."""
    image = {"image.safetensors": images()["kohya"]["one.safetensors"]}
    several = {
        f"{name}/{file.partition('/')[2]}": data
        for name in ("plain", "head")
        for file, data in adapters()[name].items()
    }
    pickled = {file.replace("one/", "pickled/"): data for file, data in pickles()["pickle"].items()}
    return {"several": several, "with a file": {**several, **image}, "with a pickle": {**several, **pickled}}


@cache
def commands() -> Mapping[str, Tree]:
    """A pack with a report, and an adapter beside it."""
    found = {}
    for name in ("float32", "coded", "folders"):

        def make(folder: Path, name: str = name) -> None:
            pack = _reopened(folder, packs()[name])
            ex.report(pack).save(folder / "pack" / keys.REPORT_FIGURES)

        found[name] = {**_made(make), **adapters()["plain"]}
    return found


@cache
def pickles() -> Mapping[str, Tree]:
    """An adapter whose weights are pickled."""
    return {"pickle": _made(lambda folder: _pickled(folder))}


def _pickled(folder: Path) -> None:
    make_adapter(folder / "one", seed=1, modules=MODULES, pickled=True)
