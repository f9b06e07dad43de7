"""Write the reference packs of tests/data/packs, and what tests/test_reference_packs.py expects of each of them.

The packs are frozen: they are what the library wrote when they were made, and later code must read them as they are. A
pack that exists is therefore never written again. This script shows how each of them was made, and adds new kinds:

    python tests/make_reference_packs.py

Numbers are drawn from seeds, so that one machine with one set of library versions writes the same bytes each time.
Packs of formats 1 to 4 are written by the last commit that wrote the format, and packs with cores by f706745; both are
taken from the history of this repository. The frozen coded packs are of format 5, which 8b6be7a was the last to write,
but those with copies (6), those with heads or a basis (7), and those with histories (8).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenlorax as ex
import lora_files
from adapters import make_adapter
from eigenlorax.core import iterative, krylov
from eigenlorax.core.adapter import LoRAFactors
from planted import factors_in, normal, orthonormal, random_factors, tree
from rests import with_rests
from runs import make_run

PACKS = Path(__file__).parent / "data" / "packs"
EXPECTED = PACKS / "expected.json"

# module → (out_features, in_features); all sizes differ, so that a swapped axis fails
MODULES = {"encoder.0.query": (17, 11), "encoder.0.value": (13, 23)}
CONVOLUTIONS = {"features.0.conv": (13, 3, 3, 5), "features.1.point": (7, 11, 1, 1), "features.2.dense": (17, 19)}
UNET = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (11, 7),
    "unet.down_blocks.0.resnets.0.conv1": (13, 5, 3, 3),
}
FORMATS = {
    1: "bef1891624098f83744fdb07237ee7eedc9f0024",
    2: "79cbdb5e51ff6412c086fea3548946aab85d0be0",
    3: "6fd77cd08937f453cca6be69e6e2f1f003ec90da",
    4: "934c8dd4c4edfab8dda5240a03cc2d7f20314224",
}
"""The last commit that wrote each earlier format."""
WITH_CORES = "f7067459a074f324f70cdbdabaaf181ea9e6ffaf"
"""A commit that wrote packs with cores; the frozen ones were written at it."""

Making = Callable[[Path], ex.Pack]
"""Make a pack; the argument is an empty folder for its sources."""


def sources(folder: Path, names: str = "a b", *, first_seed: int = 1, **options: Any) -> list[Path]:
    """Write adapter folders of ranks 2, 3, 4, …, as PEFT saves them."""
    return [
        make_adapter(folder / name, seed=first_seed + number, rank=2 + number, **{"modules": MODULES, **options})
        for number, name in enumerate(names.split())
    ]


def fit_floats(folder: Path, dtype: str, **options: Any) -> ex.Pack:
    return ex.fit(sources(folder, dtype=getattr(torch, dtype)), **{"n_components": 5, **options})


def fit_plain(folder: Path, **options: Any) -> ex.Pack:
    return ex.fit(sources(folder), **{"n_components": 5, **options})


def fit_tiny_updates(folder: Path) -> ex.Pack:
    """Updates so small that the scales of integers need a common exponent."""
    adapters = [
        ex.from_factors(
            name,
            {
                module: random_factors(2, *shape, seed=10 * number + place, dtype=torch.float32, size=1e-12)
                for place, (module, shape) in enumerate(MODULES.items())
            },
        )
        for number, name in enumerate("ab")
    ]
    return ex.fit(adapters, n_components=3, dtype="int8")


def shared_adapters(n: int, *, noise: float = 0.0, seed: int = 0, prefix: str = "a") -> list[ex.Adapter]:
    """Adapters in four directions per module and side that all of them share, with noise relative to that."""
    bases = {
        name: (orthonormal(3, n_in, seed + 11 + place), orthonormal(4, n_out, seed + 77 + place))
        for place, (name, (n_out, n_in)) in enumerate(MODULES.items())
    }
    adapters = []
    for number in range(n):
        modules = {}
        for place, name in enumerate(MODULES):
            factors = factors_in(bases[name], 2, seed=seed + 100 * number + 10 * place, noise=noise)
            modules[name] = LoRAFactors(factors.down.float(), factors.up.float(), factors.scaling)
        adapters.append(ex.from_factors(f"{prefix}{number}", modules, base_model="org/base"))
    return adapters


def fit_coded_apart(folder: Path) -> ex.Pack:
    """Adapters that share nothing: all numbers are residuals, beside empty bases."""
    return ex.fit(sources(folder), max_error=0.3)


def fit_coded_shared(max_error: float | None = 0.1, *, noise: float, n: int = 8, **options: Any) -> ex.Pack:
    return ex.fit(shared_adapters(n, noise=noise), max_error=max_error, **options)


def fit_clusters(folder: Path) -> ex.Pack:
    groups = [shared_adapters(6, noise=0.02, seed=10_000 * group, prefix=f"g{group}-") for group in range(2)]
    return ex.fit([adapter for group in groups for adapter in group], max_error=0.05)


def fit_coded_and_grown(folder: Path) -> ex.Pack:
    """A coded pack to which random components were added, and then an adapter."""
    pack = fit_coded_shared(noise=0.05, n=6).augment(2, seed=5)
    pack.add(make_adapter(folder / "late", seed=9, rank=3, modules=MODULES), warn_above=1.0)
    return pack


def fit_copies(folder: Path) -> ex.Pack:
    """A coded pack of format 6: adapters with the codes of another one, one of them with a head, and one added after
    the bases have grown."""
    adapters = shared_adapters(4, noise=0.05)
    head = {"base_model.model.classifier.weight": normal(3, 29, seed=4, dtype=torch.float32)}
    copies = [
        ex.from_factors(name, dict(adapters[0].modules), base_model="org/base", heads=heads)
        for name, heads in (("plain", {}), ("with-head", head))
    ]
    pack = ex.fit([*adapters, *copies], max_error=0.1).augment(2, seed=5)
    pack.add(replace(adapters[1], name="late"))
    return pack


def fit_coded_convolutions(folder: Path) -> ex.Pack:
    adapters = [
        replace(lora_files.planted(CONVOLUTIONS, seed=seed), name=name) for seed, name in enumerate("ab", start=1)
    ]
    return ex.fit(adapters, max_error=0.2)


def extend(folder: Path, **options: Any) -> ex.Pack:
    pack = fit_plain(folder, n_components=3, **options)
    pack.add(make_adapter(folder / "late", seed=9, rank=3, modules=MODULES), extend=2, warn_above=1.0)
    return pack


def augment(folder: Path, dtype: str) -> ex.Pack:
    pack = fit_plain(folder, n_components=3, dtype=dtype).augment(2, seed=3).augment(1, seed=8)
    pack.add(make_adapter(folder / "late", seed=9, rank=3, modules=MODULES), warn_above=1.0)
    return pack


def grow_in_both_ways(folder: Path) -> ex.Pack:
    """Steps of both kinds, with adapters of different times between them."""
    pack = fit_plain(folder, n_components=2).augment(2, seed=3)
    pack.add(make_adapter(folder / "late", seed=9, rank=3, modules=MODULES), extend=1, warn_above=1.0)
    pack = pack.augment(1, seed=4)
    pack.add(make_adapter(folder / "later", seed=10, rank=2, modules=MODULES), extend=2, warn_above=1.0)
    return pack


def fit_convolutions(folder: Path) -> ex.Pack:
    adapters = [
        replace(lora_files.planted(CONVOLUTIONS, seed=seed), name=name) for seed, name in enumerate("ab", start=1)
    ]
    return ex.fit(adapters, n_components=5, dtype="float16")


def fit_carried(folder: Path) -> ex.Pack:
    """LoRA of an embedding, DoRA magnitudes, and a module that is kept out of the subspace."""
    prefix = "base_model.model"
    tensors: dict[str, Tensor] = {
        f"{prefix}.embed.lora_embedding_A": normal(2, 31, seed=1, dtype=torch.float16),
        f"{prefix}.embed.lora_embedding_B": normal(7, 2, seed=2, dtype=torch.float16),
    }
    for place, (module, (n_out, _)) in enumerate(MODULES.items()):
        key = f"{prefix}.{module}.lora_magnitude_vector"
        tensors[key] = normal(n_out, seed=3 + place, dtype=torch.float32)
    options = {"tensors": tensors, "config": {"use_dora": True, "target_modules": ["embed", "query", "value"]}}
    whole = make_adapter(folder / "a", seed=1, rank=2, modules=MODULES, **options)
    plain = make_adapter(folder / "b", seed=2, rank=3, modules=MODULES)
    return ex.fit([whole, plain], n_components=4, exclude_modules="*value")


def fit_heads(folder: Path) -> ex.Pack:
    """Task heads, trained biases, and heads of other dtypes."""
    prefix = "base_model.model"
    one = make_adapter(folder / "a", seed=1, rank=2, modules=MODULES, head=(5, 29))
    tensors = {
        f"{prefix}.encoder.0.query.base_layer.bias": normal(17, seed=3, dtype=torch.float32),
        f"{prefix}.score.weight": normal(3, 29, seed=4, dtype=torch.bfloat16),
        f"{prefix}.score.steps": torch.arange(6),
    }
    config = {"modules_to_save": ["score"], "bias": "lora_only"}
    other = make_adapter(folder / "b", seed=2, rank=3, modules=MODULES, tensors=tensors, config=config)
    return ex.fit([one, other], n_components=4)


def fit_coded_heads(folder: Path) -> ex.Pack:
    """Coded heads, alike and not, in three dtypes, and tensors that are carried or stored exactly."""
    prefix, adapters = "base_model.model", []
    start = normal(19, 31, seed=20)
    for seed, name in enumerate("abcd", start=1):
        tensors = {
            f"{prefix}.classifier.weight": (start + 0.05 * normal(19, 31, seed=20 + seed)).float(),
            f"{prefix}.classifier.bias": normal(67, seed=30 + seed).half(),
            f"{prefix}.score.dense.weight": normal(7, 43, seed=40 + seed).double(),
            f"{prefix}.score.steps": torch.arange(6),
        }
        for module, (n_out, _) in MODULES.items():
            tensors[f"{prefix}.{module}.lora_magnitude_vector"] = normal(n_out, seed=50 + seed).abs().float()
        config = {"modules_to_save": ["classifier", "score"], "use_dora": True}
        adapters.append(make_adapter(folder / name, seed=seed, rank=2, modules=MODULES, tensors=tensors, config=config))
    *first, late = adapters
    pack = ex.fit(first, max_error=0.3)
    pack.add(late)
    return pack


def write_image_files(folder: Path, dialect: str) -> list[Path]:
    files = []
    for seed, name in enumerate("ab", start=1):
        truth = lora_files.planted(UNET, seed=seed, mixed=False, dtype=torch.float16)
        metadata = {"ss_network_module": "networks.lora", "note": f"file {name}"} if dialect == "kohya" else None
        files.append(lora_files.write(folder / f"{name}.safetensors", truth, dialect, metadata=metadata))
    return files


def fit_image_files(folder: Path, dialect: str, **options: Any) -> ex.Pack:
    """LoRA files of an image model; those of kohya have metadata."""
    return ex.fit(write_image_files(folder, dialect), **{"n_components": 4, **options})


def fit_file_metadata(folder: Path) -> ex.Pack:
    """A folder of PEFT's whose weights have metadata beside the format."""
    first, second = sources(folder)
    path = first / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "epoch": "3"})
    return ex.fit([first, second], n_components=4)


def fit_renamed(folder: Path) -> ex.Pack:
    """One module under several names: with leading components, and as transformers 4 and 5 call it."""
    names = [
        ["encoder.layer.0.attention.attention.query", "encoder.layer.0.output.dense"],
        ["vit.layers.0.attention.q_proj", "vit.layers.0.mlp.fc2"],
        ["vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.0.output.dense"],
    ]
    adapters = [
        make_adapter(folder / name, seed=seed, rank=2, modules=dict(zip(own, MODULES.values(), strict=True)))
        for seed, (name, own) in enumerate(zip("abc", names, strict=True), start=1)
    ]
    return ex.fit(adapters, n_components=4)


def fit_ranks_of_modules(folder: Path) -> ex.Pack:
    """Ranks and alphas by module, scalings of rsLoRA, and an alpha of zero."""
    tensors = {}
    for (module, (n_out, n_in)), rank in zip(MODULES.items(), (3, 5), strict=True):
        tensors[f"base_model.model.{module}.lora_A.weight"] = normal(rank, n_in, seed=rank, dtype=torch.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = normal(n_out, rank, seed=9, dtype=torch.float32)
    patterns = {"rank_pattern": {"value": 5}, "alpha_pattern": {".*query": 7, "value": 10}}
    one = make_adapter(folder / "a", seed=1, rank=3, modules=MODULES, tensors=tensors, config=patterns)
    other = make_adapter(folder / "b", seed=2, rank=3, modules=MODULES, config={"use_rslora": True})
    return ex.fit([one, other, make_adapter(folder / "c", seed=3, modules=MODULES, alpha=0)], n_components=4)


def fit_untrained(folder: Path) -> ex.Pack:
    """A module without components, which no adapter has trained, and an adapter that changes nothing."""
    zero = {f"base_model.model.{module}.lora_B.weight": torch.zeros(shape[0], 3) for module, shape in MODULES.items()}
    value = "base_model.model.encoder.0.value.lora_B.weight"
    trained = make_adapter(folder / "a", seed=1, modules=MODULES, tensors={value: zero[value]})
    return ex.fit([trained, make_adapter(folder / "b", seed=2, modules=MODULES, tensors=zero)], n_components=3)


def refit_without_originals(folder: Path) -> ex.Pack:
    """Errors that are upper bounds."""
    return ex.refit(fit_plain(folder), n_components=3, warn_above=1.0).pack


def find_number(folder: Path) -> ex.Pack:
    return ex.fit(sources(folder, "a b c"), n_components="auto", warn_above=1.0)


def remove_all(folder: Path) -> ex.Pack:
    pack = fit_plain(folder)
    pack.remove("a", "b")
    return pack


def fit_iteratively(folder: Path) -> ex.Pack:
    """Bases that were found by iteration, with a part of their spectra alone."""
    before = iterative.LARGEST_SIDE, iterative.LARGEST_STACK, krylov.BLOCK
    iterative.LARGEST_SIDE, iterative.LARGEST_STACK, krylov.BLOCK = 0, 0, 1
    try:
        return ex.fit(sources(folder, "a b c d"), n_components=1)
    finally:
        iterative.LARGEST_SIDE, iterative.LARGEST_STACK, krylov.BLOCK = before


def written_at(commit: str, folder: Path, code: str) -> ex.Pack:
    """A pack of an earlier time, written by the code of that commit. code: what makes `pack`, in an empty folder with
    adapters in `sources`, `heads` and `images`, and one more called `late`."""
    sources(folder / "sources")
    sources(folder / "heads", head=(5, 29))
    make_adapter(folder / "late", seed=9, rank=3, modules=MODULES)
    (folder / "images").mkdir()
    write_image_files(folder / "images", "kohya")
    root = Path(__file__).parents[1]
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=root, stdout=subprocess.PIPE, check=True)
    (folder / "then").mkdir()
    subprocess.run(["tar", "-x", "-C", folder / "then"], input=archive.stdout, check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder / "then" / "src")}
    code = f"import eigenlorax as ex\n{code}\npack.save('pack')\n"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, env=environment, check=True)
    return ex.Pack.open(folder / "pack")


def fit_cores(folder: Path, kind: str, dtype: str) -> ex.Pack:
    """A pack with cores, which `fit` no longer writes."""
    return written_at(WITH_CORES, folder, f"pack = ex.fit('sources', n_components=5, cores='{kind}', dtype='{dtype}')")


AUGMENTED_THEN = "pack = ex.fit('sources', n_components=3).augment(2, seed=3)\npack.add('late')"
EXTENDED_THEN = "pack = ex.fit('sources', n_components=3).augment(1, seed=3)\npack.add('late', extend=2)"


def append_versions(folder: Path) -> ex.Pack:
    """Histories beside adapters: within error bounds and pruned, and without loss in float16."""
    pack = ex.fit(sources(folder), max_error=0.3)
    for checkpoint in make_run(folder / "run", range(10, 60, 10), modules=MODULES):
        pack.append(checkpoint, metrics={"loss": 1 / int(checkpoint.name.removeprefix("checkpoint-"))})
    pack.prune("run", keep_every=20)
    for number, checkpoint in enumerate(make_run(folder / "exact", range(4), dtype=torch.float16, modules=MODULES)):
        pack.append(checkpoint, max_error=0.2 if number == 1 else None, lossless=number != 1)
    return pack


def append_files(folder: Path) -> ex.Pack:
    """A pack of histories only: of files with convolutions, and of ranks that change."""
    pack = ex.Pack.empty("org/base")
    for path in (folder / "one", folder / "other"):
        path.mkdir()
        file = write_image_files(path, "kohya")[path.name == "other"]
        pack.append(file, name="style", lossless=path.name == "other")
    for seed, rank in enumerate((5, 3, 3), start=1):
        adapter = make_adapter(folder / "ranks" / f"checkpoint-{seed}", seed=1, rank=rank, modules=MODULES)
        pack.append(adapter, max_error=0.1)
    return pack


def fit_population(folder: Path) -> ex.Pack:
    """Members in one file, of which one was removed, and one in a file of its own."""
    common, *members = make_run(folder / "run", range(5), modules=MODULES)
    pack = ex.fit({f"user-{number}": path for number, path in enumerate(members[:3])}, reference=common)
    pack.append(members[3], "late", name="members")
    pack.remove("members@user-1")
    return pack


KINDS: dict[str, Making] = {
    "float64": partial(fit_floats, dtype="float64"),
    "float32": partial(fit_floats, dtype="float32"),
    "float16": partial(fit_floats, dtype="float16"),
    "bfloat16": partial(fit_floats, dtype="bfloat16"),
    "float16-with-float32": partial(fit_plain, dtype="float16", coefficient_dtype="float32"),
    "factors-weighting": partial(fit_plain, weighting="factors"),
    "energy": partial(fit_plain, n_components=None, energy=0.8),
    "max-error-in-floats": partial(fit_plain, n_components=None, max_error=0.4, dtype="float16"),
    "auto": find_number,
    "iterative": fit_iteratively,
    "int8": partial(fit_plain, dtype="int8"),
    "int4": partial(fit_plain, dtype="int4"),
    "int4-with-int4": partial(fit_plain, dtype="int4", coefficient_dtype="int4"),
    "int8-with-float16": partial(fit_plain, dtype="int8", coefficient_dtype="float16"),
    "int8-with-exponents": fit_tiny_updates,
    "full-cores-float32": lambda folder: fit_cores(folder, "full", "float32"),
    "full-cores-float16": lambda folder: fit_cores(folder, "full", "float16"),
    "diagonal-cores-float32": lambda folder: fit_cores(folder, "diagonal", "float32"),
    "diagonal-cores-bfloat16": lambda folder: fit_cores(folder, "diagonal", "bfloat16"),
    "coded-apart": fit_coded_apart,
    "coded-terms": lambda folder: fit_coded_shared(noise=0.1),
    "coded-terms-and-cores": lambda folder: fit_coded_shared(noise=0.05),
    "coded-cores": lambda folder: fit_coded_shared(0.05, noise=0.0, n=5),
    "coded-for-bytes": lambda folder: fit_coded_shared(None, noise=0.1, n=4, max_bytes=600),
    "coded-for-ratio": lambda folder: fit_coded_shared(None, noise=0.1, n=4, ratio=4.0),
    "coded-clusters": fit_clusters,
    "coded-and-grown": fit_coded_and_grown,
    "coded-convolutions": fit_coded_convolutions,
    "coded-copies": fit_copies,
    "coded-heads": fit_coded_heads,
    "coded-with-basis": lambda folder: ex.fit(sources(folder, "a b c"), max_error=0.3, basis=3),
    "for-serving": lambda folder: ex.fit(sources(folder, "a b c"), purpose="serving"),
    "extended": extend,
    "extended-int8": partial(extend, dtype="int8"),
    "augmented-float32": partial(augment, dtype="float32"),
    "augmented-float16": partial(augment, dtype="float16"),
    "augmented-int4": partial(augment, dtype="int4"),
    "grown-in-both-ways": grow_in_both_ways,
    "residuals": lambda folder: with_rests(fit_plain(folder), {"a": ["both", "down"], "b": ["up", "none"]}),
    "convolutions": fit_convolutions,
    "carried": fit_carried,
    "heads": fit_heads,
    "image-kohya": partial(fit_image_files, dialect="kohya"),
    "image-diffusers": partial(fit_image_files, dialect="diffusers"),
    "image-lora-down": partial(fit_image_files, dialect="lora.down"),
    "image-processor-int8": partial(fit_image_files, dialect="processor", dtype="int8"),
    "file-metadata": fit_file_metadata,
    "renamed": fit_renamed,
    "ranks-of-modules": fit_ranks_of_modules,
    "untrained": fit_untrained,
    "empty": remove_all,
    "bounds": refit_without_originals,
    "histories": append_versions,
    "histories-only": append_files,
    "population": fit_population,
    "format-1": lambda folder: written_at(FORMATS[1], folder, "pack = ex.fit('heads', n_components=4)"),
    "format-1-augmented": lambda folder: written_at(FORMATS[1], folder, AUGMENTED_THEN),
    "format-2": lambda folder: written_at(
        FORMATS[2], folder, "pack = ex.fit('sources', max_error=0.4, dtype='float16')"
    ),
    "format-2-augmented": lambda folder: written_at(FORMATS[2], folder, AUGMENTED_THEN),
    "format-3": lambda folder: written_at(FORMATS[3], folder, EXTENDED_THEN),
    "format-4": lambda folder: written_at(FORMATS[4], folder, "pack = ex.fit('images', n_components=4)"),
}

EXPORTS: dict[str, list[dict[str, str]]] = {
    "carried": [{}, {"dtype": "bfloat16"}],
    "coded-cores": [{}, {"dtype": "float16"}],
    "coded-terms": [{}, {"dtype": "float16"}],
    "diagonal-cores-float32": [{}, {"dtype": "float16"}],
    "float32": [{}, {"dtype": "float16"}],
    "float64": [{}, {"dtype": "float16"}, {"dtype": "float32"}],
    "grown-in-both-ways": [{}, {"dtype": "float16"}],
    "histories": [{}, {"dtype": "float16"}],
    "image-diffusers": [{}, {"format": "kohya", "dtype": "float16"}],
    "image-kohya": [{}, {"dtype": "float16"}, {"format": "peft"}, {"format": "diffusers"}],
    "int8": [{}, {"dtype": "float16"}],
}
"""The options of each export of a kind; one without options where nothing else is said."""


def digest_arithmetic() -> str:
    """Return a digest of a product and of decompositions in float64, which other kernels round otherwise."""
    numbers = torch.arange(13 * 9, dtype=torch.float64).square().remainder(97) / 97
    results = []
    for rows in (numbers.reshape(13, 9), numbers[:35].reshape(7, 5)):
        results += [rows.mT @ rows, *torch.linalg.svd(rows, full_matrices=False), *torch.linalg.qr(rows)]
    return sha256(b"".join(result.contiguous().numpy().tobytes() for result in results)).hexdigest()


def export(pack: ex.Pack, folder: Path, options: Mapping[str, str]) -> dict[str, bytes]:
    """Export all adapters and versions of a pack, and return the bytes of every file by its path in the folder."""
    versions = [history.full_name(record) for history in pack.histories.values() for record in history]
    pack.export(folder, [*pack.names, *versions], **options)
    return tree(folder)


def measure(pack: ex.Pack, exports: list[dict[str, str]]) -> dict[str, Any]:
    """Return what a pack on disk is expected to be: versions, fingerprints, and digests of everything it exports."""
    assert pack.path is not None
    found = []
    for options in exports:
        with tempfile.TemporaryDirectory() as folder:
            files = export(pack, Path(folder) / "out", options)
        found.append({"options": options, "files": {path: sha256(data).hexdigest() for path, data in files.items()}})
    return {
        "arithmetic": digest_arithmetic(),
        "exports": found,
        "fingerprints": list(pack.subspace.lineage),
        "format_version": json.loads((pack.path / "subspace_config.json").read_text("utf-8"))["format_version"],
    }


def write(kind: str) -> dict[str, Any]:
    """Write the pack of a kind, and return what is expected of it."""
    with tempfile.TemporaryDirectory() as folder:
        pack = KINDS[kind](Path(folder))
        made = pack.path or pack.save(Path(folder) / "pack")
        # the card is no part of the format, and a copy of a pack needs no lock
        shutil.copytree(made, PACKS / kind, ignore=shutil.ignore_patterns("README.md", ".lock"))
    return measure(ex.Pack.open(PACKS / kind), EXPORTS.get(kind, [{}]))


def main() -> None:
    """Write the packs that are not there yet."""
    warnings.simplefilter("ignore", ex.errors.EigenloraxWarning)
    PACKS.mkdir(parents=True, exist_ok=True)
    expected = json.loads(EXPECTED.read_text("utf-8")) if EXPECTED.exists() else {}
    for kind in KINDS:
        if kind not in expected:
            expected[kind] = write(kind)
            EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
