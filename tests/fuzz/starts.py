"""Inputs that are right, from which hostile ones are made: small, one of each kind of file that is read."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import test_mlx
import test_official
import torch
from safetensors.torch import save_file

import eigenlorax as ex
import gguf_models
import lora_files
from adapters import change_config, make_adapter
from eigenlorax.core import atomic_files, keys, module_patterns
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import EigenloraxWarning
from make_reference_packs import PACKS
from reports import synthetic
from runs import make_run
from versions import unfolded

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
CONFIG, WEIGHTS = keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS
TRAINED = ("float32", "int8", "coded-cores", "full-cores-float32", "diagonal-cores-float32", "extended")
"""Packs with an adapter that serves as one that was trained on coefficients."""


def tree_of(folder: Path) -> Tree:
    """All files of a folder; locks aside, which are empty."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != keys.LOCK]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _made(make: Callable[[Path], object]) -> Tree:
    """The files that a call leaves in an empty folder."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", EigenloraxWarning)
        make(Path(folder))
        tree = tree_of(Path(folder))
        return _unfolded(tree) if f"pack/{keys.MANIFEST}" in tree else tree


def _below(name: str, tree: Tree) -> Tree:
    """The same files in a folder of this name."""
    return {f"{name}/{path}": data for path, data in tree.items()}


@cache
def packs() -> Mapping[str, Tree]:
    """The frozen packs: of each storage, each version of the format, each kind of adapter."""
    return {path.name: _frozen(path.name) for path in sorted(PACKS.iterdir()) if path.is_dir()}


def _frozen(name: str) -> Tree:
    return _unfolded(_below("pack", tree_of(PACKS / name)))


def _unfolded(tree: Tree) -> Tree:
    """A pack whose manifest has each field of its sides and adapters where changes look for it."""
    path = f"pack/{keys.MANIFEST}"
    body = json.loads(tree[path])
    if body["format_version"] < 8:
        return tree
    body = unfolded(body)
    del body["digest"]
    canonical = json.dumps(body, indent=1, sort_keys=True) + "\n"
    body["digest"] = atomic_files.digest(canonical.encode())
    return {**tree, path: json.dumps(body, indent=1, sort_keys=True).encode()}


@cache
def histories() -> Mapping[str, Tree]:
    """Packs of versions, with other tensors and in other dtypes."""
    makers = {
        "lossy": _make_history,
        "lossy-float16": partial(_make_history, dtype=torch.float16),
        "lossless": partial(_make_history, lossless=True),
        "lossless-float16": partial(_make_history, lossless=True, dtype=torch.float16),
        "lossless-file": _make_file_history,
        "population": _make_population,
    }
    return {name: _made(make) for name, make in makers.items()}


def _make_history(folder: Path, *, dtype: torch.dtype = torch.float32, **options: bool) -> None:
    pack = ex.Pack.empty()
    for step, checkpoint in enumerate(make_run(folder / "run", range(3), dtype=dtype, modules=MODULES)):
        pack.append(checkpoint, metrics={"loss": 0.5 + step}, **options)
    pack.save(folder / "pack")
    shutil.rmtree(folder / "run")


def _make_population(folder: Path) -> None:
    """Of two members in one file, and one in a file of its own."""
    common, *members = make_run(folder / "run", range(4), modules=MODULES)
    pack = ex.fit({f"m{number}": path for number, path in enumerate(members[:2])}, reference=common)
    pack.append(members[2], "late", name="members")
    pack.save(folder / "pack")
    shutil.rmtree(folder / "run")


def _make_file_history(folder: Path) -> None:
    """Of a single file, whose metadata comes back."""
    truth = lora_files.planted(UNET, seed=3, mixed=False)
    file = lora_files.write(folder / "style.safetensors", truth, "kohya", metadata={"note": "n"})
    pack = ex.Pack.empty()
    for _ in range(2):
        pack.append(file, lossless=True)
    pack.save(folder / "pack")
    file.unlink()


@cache
def adapters() -> Mapping[str, Tree]:
    """Folders of adapters, as PEFT and as the paper's authors save them."""
    makers = {
        "plain": lambda folder: make_adapter(folder, seed=1, modules=MODULES),
        "patterns": _make_patterns,
        "head": _make_head,
        "convolution": lambda folder: ex.write_adapter(lora_files.planted(CONVOLUTION, seed=1, mixed=False), folder),
        "official": lambda folder: test_official.make(folder, lora_alpha=7),
        "metadata": _make_metadata,
        "adalora": _make_adalora,
    }
    return {name: _made(lambda folder, make=make: make(folder / "one")) for name, make in makers.items()}


def _make_patterns(folder: Path) -> None:
    make_adapter(folder, seed=2, modules=MODULES)
    patterns = {QUERY: 3, module_patterns.exact_pattern(VALUE): 3, "other.*": 5}
    change_config(folder, r=8, rank_pattern=patterns, alpha_pattern={"value": 9}, use_rslora=True)


def _make_head(folder: Path) -> None:
    """With a task's head, and tensors that no subspace holds."""
    make_adapter(
        folder,
        seed=3,
        modules=MODULES,
        head=(2, 31),
        tensors={
            **{
                f"base_model.model.{module}.lora_magnitude_vector": torch.ones(n_out)
                for module, (n_out, _) in MODULES.items()
            },
            "base_model.model.embed.lora_embedding_A": torch.ones(3, 40),
            "base_model.model.embed.lora_embedding_B": torch.ones(7, 3),
            f"base_model.model.{QUERY}.base_layer.bias": torch.ones(17),
        },
        config={"use_dora": True, "bias": "lora_only"},
    )


def _make_adalora(folder: Path) -> None:
    """Of PEFT's AdaLoRA, with a masked triplet and a module without any."""
    make_adapter(folder, seed=1, modules=MODULES)
    tensors = {}
    for module, factors in ex.read_adapter(folder).modules.items():
        rank = 0 if module == VALUE else factors.spec.rank
        values = torch.arange(float(rank))[:, None]
        parts = {"lora_A": factors.down[:rank], "lora_B": factors.up[:, :rank], "lora_E": values}
        tensors |= {f"base_model.model.{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        init_r = factors.spec.rank
    save_file(tensors, folder / WEIGHTS)
    change_config(folder, peft_type="ADALORA", init_r=init_r, rank_pattern={f"{VALUE}.lora_E": [False] * init_r})


def _make_metadata(folder: Path) -> None:
    """Of a file that says of itself more than its format."""
    make_adapter(folder, seed=1, modules=MODULES)
    tensors = {
        keys.lora_key(module, side): weight
        for module, factors in ex.read_adapter(folder).modules.items()
        for side, weight in zip(keys.SIDES, factors.weights, strict=True)
    }
    metadata = {"format": "pt", "note": "n", "json": json.dumps({"a": [1, {"b": None}]})}
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


@cache
def pickles() -> Mapping[str, Tree]:
    """An adapter whose weights are pickled."""
    return {"pickle": _made(lambda folder: make_adapter(folder / "one", seed=1, modules=MODULES, pickled=True))}


@cache
def coefficients() -> Mapping[str, Tree]:
    """A pack, and beside it an adapter that was trained on coefficients in its subspace, of each storage."""
    found = {}
    for name in TRAINED:
        pack = _frozen(name)
        first = min(path for path in pack if path.endswith(f"/{CONFIG}")).removesuffix(CONFIG)
        config = {**json.loads(pack[first + CONFIG]), "subspace": "../pack"}
        one = {CONFIG: json.dumps(config).encode(), WEIGHTS: pack[first + WEIGHTS]}
        found[name] = {**pack, **_below("one", one)}
    return found


@cache
def images() -> Mapping[str, Tree]:
    """LoRA files of image models, in each dialect."""
    planted = lora_files.planted(UNET, seed=1)
    metadata = {"ss_note": "n", "sshs_model_hash": "0"}
    dialects = {
        dialect: _made(
            lambda folder, dialect=dialect: lora_files.write(
                folder / "one.safetensors", planted, dialect, metadata=metadata
            )
        )
        for dialect in lora_files.DIALECTS
    }
    convolution, block = "lora_unet_mid_block_resnets_0_conv1", "lora_unet_double_blocks_0_img_attn_qkv"
    three_factors = {
        f"{convolution}.lora_down.weight": torch.ones(2, 5, 1, 1),
        f"{convolution}.lora_mid.weight": torch.ones(2, 2, 3, 3),
        f"{convolution}.lora_up.weight": torch.ones(7, 2, 1, 1),
        f"{convolution}.alpha": torch.tensor(1.0),
        f"{convolution}.dora_scale": torch.ones(7, 1, 1, 1),
    }
    flux = {
        f"{block}.lora_down.weight": torch.ones(2, 6),
        f"{block}.lora_up.weight": torch.ones(18, 2),
        f"{block}.alpha": torch.tensor(2.0),
        "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(2, 6),
        "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.ones(42, 2),
        "lora_unet_single_blocks_0_linear1.alpha": torch.tensor(2.0),
    }
    return {
        **dialects,
        "three factors": _made(lambda folder: save_file(three_factors, folder / "one.safetensors")),
        "flux": _made(lambda folder: save_file(flux, folder / "one.safetensors")),
    }


@cache
def mlx() -> Mapping[str, Tree]:
    """Folders of mlx-lm: LoRA and DoRA, with embeddings and stacked experts."""
    linear = {"model.layers.0.self_attn.q_proj": (7, 11), "model.layers.1.mlp.up_proj": (13, 19)}
    plain = test_mlx.planted(linear, rank=test_mlx.RANK)
    experts = "model.layers.1.mlp.switch_mlp.up_proj"
    others = {
        **test_mlx.planted({"model.embed_tokens": (7, 23)}),
        f"{experts}.lora_a": torch.ones(3, test_mlx.RANK, 5),
        f"{experts}.lora_b": torch.ones(3, 4, test_mlx.RANK),
    }
    old = {"use_dora": True, "lora_layers": 16, "peft_type": "LORA"}
    makers = {
        "lora": lambda folder: test_mlx.save(folder, plain),
        "dora": lambda folder: test_mlx.save(folder, test_mlx.planted(linear, dora=True), kind="dora"),
        "others": lambda folder: test_mlx.save(folder, {**plain, **others}),
        "old": lambda folder: test_mlx.save(folder, test_mlx.planted(linear, dora=True), kind=None, **old),
    }
    return {name: _made(lambda folder, make=make: make(folder / "one")) for name, make in makers.items()}


@cache
def gguf() -> Mapping[str, Tree]:
    """LoRAs of llama.cpp in each type of tensors, and the config of a base model whose rows are reordered."""
    config, reordered = gguf_models.config("Qwen2ForCausalLM"), gguf_models.config()

    def make(folder: Path, dtype: str, fields: dict[str, Any]) -> None:
        adapter = gguf_models.adapter(rank=32)
        names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
        few = from_factors("one", {name: adapter.modules[name] for name in names}, base_model="org/tiny-1B")
        ex.write_adapter(few, folder / "one", format="gguf", dtype=dtype, base_config=fields)
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text(json.dumps(fields))

    return {
        **{
            dtype: _made(lambda folder, dtype=dtype: make(folder, dtype, config))
            for dtype in ("float32", "float16", "bfloat16", "q8_0")
        },
        "reordered": _made(lambda folder: make(folder, "float32", reordered)),
    }


@cache
def collections() -> Mapping[str, Tree]:
    """Folders with adapters in all forms."""
    several = _below("a", _inside(adapters()["plain"])) | _below("b", _inside(adapters()["head"]))
    return {
        "several": several,
        "with a file": {**several, "image.safetensors": images()["kohya"]["one.safetensors"]},
    }


def _inside(tree: Tree) -> Tree:
    """The files of the one adapter of a tree."""
    return {path.removeprefix("one/"): data for path, data in tree.items()}


@cache
def rows() -> Mapping[str, Tree]:
    """Rows to train on, in each format of text."""
    texts = [("a text", "yes"), ("another, with a comma", "no"), ('a "quoted" one\nof two lines', "yes")]
    objects = [{"text": text, "label": label, "n": number} for number, (text, label) in enumerate(texts)]
    numbered = [{"text": "t", "label": number % 2} for number in range(4)]
    table = "".join('"{}",{}\n'.format(text.replace('"', '""'), label) for text, label in [("text", "label"), *texts])
    return {
        "lines": {"rows.jsonl": "\n".join(map(json.dumps, objects)).encode()},
        "numbers": {"rows.ndjson": "\n".join(map(json.dumps, numbered)).encode()},
        "table": {"rows.csv": table.encode()},
        "table of numbers": {"rows.csv": b"text,label\na,0\nb,1\nc,0\n"},
    }


@cache
def reports() -> Mapping[str, Tree]:
    """Reports: one with every field filled, and one of a pack without its originals."""
    return {
        "full": _made(lambda folder: synthetic.report(4, layers=2, width=40, k=4).save(folder / "report.json")),
        "bare": _made(lambda folder: ex.report(ex.Pack.open(PACKS / "float32")).save(folder / "report.json")),
    }


COMMAND = "command"
"""What is run."""


@cache
def commands() -> Mapping[str, Tree]:
    """A pack with a report, and an adapter beside it."""
    found = {}
    for name in ("float32", "coded-apart", "heads", "histories"):

        def report(folder: Path, name: str = name) -> None:
            ex.report(ex.Pack.open(PACKS / name)).save(folder / keys.REPORT_FIGURES)

        found[name] = {
            COMMAND: b"inspect pack",
            **_frozen(name),
            **_below("pack", _made(report)),
            **adapters()["plain"],
        }
    return found


OPTIONS = "options.json"
"""What a fit was asked for."""


class _StopError(Exception):
    """An end of a fit before its last step."""


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

    several = [json.dumps({"n_components": 3, **more}) for more in ({}, {"dtype": "int8"})]
    return {options: _made(lambda folder, options=options: make(folder, options)) for options in several}


@cache
def whole_packs() -> Mapping[str, Tree]:
    """The packs of the same fits without an interruption, by their options."""
    found = {}
    for options, tree in checkpoints().items():
        with tempfile.TemporaryDirectory() as folder:
            write(tree, Path(folder, "input"))
            ex.fit(Path(folder, "input", "in"), **json.loads(options)).save(Path(folder, "pack"))
            found[options] = tree_of(Path(folder, "pack"))
    return found
