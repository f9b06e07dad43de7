"""Packs with cores: planted ones are found, figures are those of dense matrices, and every verb reads them."""

import json
import shutil

import numpy as np
import pytest
import torch
from core_packs import fit_with_cores
from safetensors.torch import load_file
from test_manifest import signed
from test_read_pack import assert_reads_what_the_library_reads

import eigenlorax as ex
import lora_files
import reference
from adapters import change_config, change_tensors, make_adapter, make_adapters
from coded_collections import changed, convolution, lacking, of_ranks, untrained
from eigenlorax.codec.storage.base import ModuleSlot
from eigenlorax.codec.storage.table import storage_by_name
from eigenlorax.core import keys
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import NonFiniteError, OptionError, PackDamagedError
from eigenlorax.pack import manifest_json
from eigenlorax.reports import report
from outcomes import contents
from planted import MODULES, generator, normal, random_adapter, random_collection, shared_collection
from versions import older

K = 5
KINDS = ("full", "diagonal")
QUERY, DENSE = MODULES


def planted_terms():
    """Of each module, K rows of each side, of length 1 and not orthogonal."""
    unit = torch.nn.functional.normalize
    return {
        name: (unit(normal(K, n_in, seed=3 + i)), unit(normal(K, n_out, seed=30 + i)))
        for i, (name, (n_out, n_in)) in enumerate(MODULES.items())
    }


def sums_of_terms(n, *, first=0, rank=3, dtype=torch.float64):
    """Adapters whose updates are sums of `rank` of these terms, each of another choice, in a gauge of their own."""
    terms, found = planted_terms(), []
    for index in range(first, first + n):
        modules = {}
        for place, (name, (down, up)) in enumerate(terms.items()):
            g = generator(100 * index + place)
            chosen = torch.randperm(K, generator=g)[:rank]
            mixed = torch.randn(rank, rank, generator=g, dtype=torch.float64)
            sizes = torch.randn(rank, generator=g, dtype=torch.float64)
            factors = torch.linalg.solve(mixed, down[chosen]), (up[chosen].mT * sizes) @ mixed
            modules[name] = LoRAFactors(*(factor.to(dtype) for factor in factors), 0.5 + index)
        found.append(from_factors(f"s{index}", modules, base_model="org/base"))
    return found


def true_error(one, pack):
    return reference.delta_error(one, pack.adapter(one.name, torch.float64))


class TestDiagonal:
    def test_planted_terms_are_found(self):
        adapters = sums_of_terms(9)
        pack = fit_with_cores(adapters, "diagonal", n_components=K)
        assert max(record.delta_error for record in pack.records.values()) < 1e-6
        assert max(true_error(one, pack) for one in adapters) < 1e-6
        for name, planted in planted_terms().items():
            bases = pack.subspace.modules[name]
            alike = [
                (rows @ bases.side(side).components.mT).abs() for rows, side in zip(planted, keys.SIDES, strict=True)
            ]
            # each is one of those planted, up to its sign, and both sides are in one order
            assert alike[0].amax(1).tolist() == pytest.approx([1.0] * K, abs=1e-6)
            assert alike[0].argmax(1).tolist() == alike[1].argmax(1).tolist()
            sizes = torch.stack([pack.packed(a.name).coefficients[name].down.square().diagonal() for a in adapters])
            assert int((sizes > 1e-6 * sizes.max()).sum()) == 3 * len(adapters)

    def test_cores_are_the_best_that_dense_least_squares_find(self):
        adapters = random_collection(6)
        pack = fit_with_cores(adapters, "diagonal", n_components=K, dtype="float64")
        for one in adapters:
            for name, factors in one.modules.items():
                down, up = (pack.subspace.modules[name].side(side).components.numpy() for side in keys.SIDES)
                design = np.stack([np.outer(u, v).ravel() for u, v in zip(up, down, strict=True)], axis=1)
                best = np.linalg.lstsq(design, reference.dense(factors).ravel(), rcond=None)[0]
                kept = reference.dense(pack.adapter(one.name).modules[name])
                np.testing.assert_allclose(kept, (design @ best).reshape(kept.shape), atol=1e-9 * np.abs(kept).max())
            assert pack.records[one.name].delta_error == pytest.approx(true_error(one, pack), rel=1e-9)
        # a module's share of energy is that in the span of its rows
        bases = pack.subspace.modules[QUERY]
        weights = [sum(np.square(reference.dense(f)).sum() for f in one.modules.values()) ** -0.5 for one in adapters]
        stacked = np.concatenate(
            [w * reference.dense(a.modules[QUERY]) for w, a in zip(weights, adapters, strict=True)]
        )
        span = np.linalg.qr(bases.down.components.numpy().T)[0]
        assert bases.down.energy == pytest.approx(np.square(stacked @ span).sum() / np.square(stacked).sum())
        assert bases.down.square == pytest.approx(np.square(stacked).sum(), rel=1e-6)

    def test_of_sums_of_its_terms_rounding_is_all_that_is_lost(self):
        adapters = sums_of_terms(9)
        pack = fit_with_cores(adapters, "diagonal", n_components=K, dtype="float16")
        for one in adapters:
            record = pack.records[one.name]
            assert 1e-5 < record.delta_error < 2e-3
            assert record.delta_error == pytest.approx(true_error(one, pack), rel=1e-4)

    def test_adapters_come_back_with_the_rank_of_the_cores_and_their_scaling(self, tmp_path):
        make_adapter(tmp_path / "a", seed=9, config={"use_rslora": True, "rank_pattern": {"value": 2}})
        change_tensors(tmp_path / "a", _cut_value)
        make_adapters(tmp_path / "more", "b c")
        pack = fit_with_cores([tmp_path / "a", tmp_path / "more"], "diagonal", n_components=7)
        before = ex.read_adapter(tmp_path / "a")
        pack.export(tmp_path / "out")
        config = json.loads((tmp_path / "out/a/adapter_config.json").read_text())
        assert (config["r"], config["rank_pattern"], config["use_rslora"]) == (7, {}, True)
        assert config["lora_dropout"] == 0.1
        for name, spec in ex.read_adapter(tmp_path / "out" / "a").specs.items():
            assert spec.rank == 7
            assert spec.scaling == pytest.approx(before.specs[name].scaling)
        assert pack.records["a"].ranks == [2, 3]

    def test_as_many_terms_as_there_are(self):
        """No more than ranks add up to, nor than a side has dimensions, and what is zero is none."""
        one = fit_with_cores([random_adapter("a", 1, rank=3)], "diagonal", n_components=20)
        assert {(side.k) for pair in one.info.modules.values() for side in pair.values()} == {3}
        adapters = [random_adapter(f"a{i}", i, rank=4, modules={"m": (7, 31)}) for i in range(4)]
        narrow = fit_with_cores(adapters, "diagonal", n_components=20)
        assert {side.k for side in narrow.info.modules["m"].values()} == {7}


def _cut_value(tensors):
    for key in [key for key in tensors if "value" in key]:
        tensors[key] = tensors[key][:2].clone() if "lora_A" in key else tensors[key][:, :2].clone()


class TestFull:
    def test_is_the_float_pack_of_the_same_components(self):
        adapters = random_collection(5)
        plain, cores = ex.fit(adapters, n_components=K), fit_with_cores(adapters, "full", n_components=K)
        assert cores.subspace.fingerprint == plain.subspace.fingerprint
        assert (plain.cores, cores.cores) == (None, "full")
        for one in adapters:
            record = cores.records[one.name]
            assert record.delta_error == pytest.approx(plain.records[one.name].delta_error, abs=1e-6)
            assert record.delta_error == pytest.approx(true_error(one, cores), rel=1e-6)
            assert record.coefficient_bytes == 4 * K * K * len(MODULES)
            assert cores.adapter(one.name).ranks == one.ranks
            off = reference.delta_error(plain.adapter(one.name), cores.adapter(one.name))
            assert off < 1e-6

    def test_of_energy_sides_have_sizes_of_their_own(self):
        adapters, _ = shared_collection(8, k_down=4, k_up=6)
        pack = fit_with_cores(adapters, "full", energy=1.0, dtype="float64")
        sizes = pack.info.modules[QUERY]
        assert (sizes["down"].k, sizes["up"].k) == (4, 6)
        assert max(true_error(one, pack) for one in adapters) < 1e-6
        core = pack.packed("adapter-0").payload[keys.core_key(QUERY, "full")]
        assert core.shape == (6, 4)

    def test_what_rounding_adds_beyond_the_rank_is_left_out(self):
        pack = fit_with_cores(random_collection(4), "full", n_components=8, dtype="float16")
        core = pack.packed("a0").payload[keys.core_key(QUERY, "full")]
        assert int(torch.linalg.matrix_rank(core.double(), rtol=1e-6)) > 2
        one = pack.packed("a0").coefficients[QUERY]
        wanted = np.linalg.svd(core.double().numpy())
        best = (wanted[0][:, :2] * wanted[1][:2]) @ wanted[2][:2]
        np.testing.assert_allclose((one.up.double() @ one.down.double()).numpy(), best, atol=1e-5)


COLLECTIONS = {
    "ranks that differ, in float16": lambda: of_ranks([1, 2, 5, 8], noise=0.1, dtype=torch.float16),
    "modules that some lack": lambda: lacking(random_collection(4)),
    "a module that nobody trained": lambda: [untrained(one, QUERY) for one in random_collection(2)],
    "lopsided factors": lambda: [changed(one, down=1e15, up=1e-15) for one in random_collection(3)],
    "two copies": lambda: [random_adapter("a", 1), random_adapter("b", 1)],
    "single rows": lambda: random_collection(3, modules={"row": (1, 50), "column": (53, 1)}),
    "convolutions": lambda: [convolution(seed) for seed in range(3)],
}


@pytest.mark.filterwarnings("ignore::eigenlorax.errors.DuplicateAdapterWarning")
@pytest.mark.parametrize("name", COLLECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_adapters_are_kept_as_the_records_say(kind, name, tmp_path):
    adapters = COLLECTIONS[name]()
    pack = fit_with_cores(adapters, kind, n_components=4)
    assert_reads_what_the_library_reads(pack.save(tmp_path / "pack"))
    opened = ex.Pack.open(tmp_path / "pack")
    assert opened.records == pack.records
    for one in adapters:
        kept = opened.adapter(one.name, torch.float64)
        assert {module: spec.kernel for module, spec in kept.specs.items()} == {
            module: spec.kernel for module, spec in one.specs.items()
        }
        assert opened.records[one.name].delta_error == pytest.approx(true_error(one, opened), abs=1e-6)
    opened.export(tmp_path / "loras")
    ex.read_adapter(tmp_path / "loras" / adapters[0].name)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Four adapters, one with a head."""
    place = tmp_path_factory.mktemp("sources")
    make_adapters(place, "a b c", shared=6)
    make_adapter(place / "d", seed=9, shared=6, head=(2, 31))
    return place


@pytest.fixture(scope="module", params=[("full", "float16"), ("diagonal", "float32")], ids="-".join)
def made(request, sources, tmp_path_factory):
    kind, dtype = request.param
    pack = fit_with_cores(sources, kind, n_components=K, dtype=dtype)
    return pack, pack.save(tmp_path_factory.mktemp("made") / "pack")


@pytest.fixture
def path(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "pack")


class TestWritten:
    def test_and_read_it_is_the_same_and_written_again_to_the_byte(self, made, path, tmp_path):
        pack, opened = made[0], ex.Pack.open(path)
        opened.verify()
        assert (opened.info, opened.records, opened.summary) == (pack.info, pack.records, pack.summary)
        assert opened.cores == pack.cores
        for name in pack.names:
            for module, factors in pack.adapter(name).modules.items():
                other = opened.adapter(name).modules[module]
                assert torch.equal(factors.down, other.down)
                assert torch.equal(factors.up, other.up)
        assert contents(opened.save(tmp_path / "again")) == contents(path)

    def test_every_figure_of_bytes_is_counted_in_the_files(self, made):
        pack, path = made
        for name in pack.names:
            stored = load_file(path / "adapters" / name / keys.ADAPTER_WEIGHTS)
            counted = sum(tensor.nbytes for key, tensor in stored.items() if "eigenlorax_core" in key)
            assert pack.records[name].coefficient_bytes == counted > 0
            assert len(stored) == 3 + (name == "d")
            config = json.loads((path / "adapters" / name / keys.ADAPTER_CONFIG).read_text())
            # by this, what reads floats alone refuses the adapter
            assert config[keys.COEFFICIENT_DTYPE] == pack.coefficient_storage == f"{pack.cores}-{pack.storage}"
            numbers = K if pack.cores == "diagonal" else K * K
            assert counted == 3 * numbers * pack.dtype.itemsize

    def test_verified_from_the_originals(self, path, sources):
        assert ex.verify(ex.Pack.open(path), sources).holds

    def test_what_is_no_core_is_damage(self, path):
        pack = ex.Pack.open(path)
        packed = pack.packed("a")
        key = min(packed.payload)
        for wrong, message in (
            (packed.payload[key][..., None], r"and should be \(5.*\), torch.float"),
            (packed.payload[key].double(), r"torch.float64, and should be \(5.*\), torch.float"),
        ):
            tensors = {**packed.payload, key: wrong}
            slots = {m: ModuleSlot(p, 3, 1.0, ()) for m, p in packed.subspace_names.items()}
            with pytest.raises(ValueError, match=message):
                storage_by_name(pack.coefficient_storage).read_adapter(tensors, slots, lambda: pack.subspace)
        change_tensors(path / "adapters" / "a", lambda tensors: tensors.update({key: packed.payload[key] + 1}))
        with pytest.raises(PackDamagedError, match="was changed after it was written"):
            ex.Pack.open(path).packed("a")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda body: body["subspace"].update(dtype="full-float32"), "subspace.dtype is one of cores"),
            (lambda body: body["subspace"].update(dtype="int8"), "cores are between rows of no float dtype"),
            (
                lambda body: min(body["subspace"]["modules"].items())[1]["up"].update(k=4),
                "two sides of a module differ",
            ),
            (lambda body: body.update(older(body, 4)), "a dtype is not known"),
        ],
    )
    def test_a_manifest_that_cannot_be_is_damage(self, path, change, message):
        file = path / keys.MANIFEST
        body = json.loads(file.read_text())
        if body["coefficient_dtype"].startswith("full"):
            body["coefficient_dtype"] = "diagonal-float16"
        change(body)
        with pytest.raises(PackDamagedError, match=message):
            manifest_json.parse(signed(body), file)

    def test_order_does_not_matter(self, made, sources):
        pack, _ = made
        turned = fit_with_cores([sources / name for name in "dbca"], pack.cores, n_components=K, dtype=pack.storage)
        assert turned.subspace.fingerprint == pack.subspace.fingerprint
        assert turned.records == pack.records


class TestChanged:
    def test_one_that_is_a_sum_of_its_terms_is_added_whole(self, tmp_path):
        path = fit_with_cores(sums_of_terms(9), "diagonal", n_components=K).save(tmp_path / "pack")
        (new,) = sums_of_terms(1, first=20)
        with ex.Pack.edit(path) as pack:
            assert pack.add(new).delta_error < 1e-6
            pack.remove("s0")
        opened = ex.Pack.open(path)
        assert true_error(new, opened) < 1e-6
        assert "s0" not in opened
        assert_reads_what_the_library_reads(path)

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.LossWarning")
    def test_augmented_it_says_what_it_said_and_takes_more(self, path):
        pack = ex.Pack.open(path)
        before = {name: pack.adapter(name, torch.float64) for name in pack.names}
        wide = pack.augment(3, seed=7)
        stranger = random_adapter("new", 5, modules=_shapes(pack))
        record, narrow = wide.add(stranger, same_base=True), pack.add(stranger, same_base=True)
        assert record.delta_error < narrow.delta_error
        wide.save(path, overwrite=True)
        opened = ex.Pack.open(path)
        for name, one in before.items():
            assert reference.delta_error(one, opened.adapter(name, torch.float64)) < 1e-7
        assert true_error(stranger, opened) == pytest.approx(record.delta_error, abs=1e-6)
        assert_reads_what_the_library_reads(path)

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.LossWarning")
    def test_full_cores_are_extended_and_pairs_are_not(self, path):
        pack = ex.Pack.open(path)
        stranger = random_adapter("new", 5, modules=_shapes(pack))
        if pack.cores == "diagonal":
            with pytest.raises(OptionError, match="rows of its sides go in pairs. Add the adapter without extend"):
                pack.add(stranger, same_base=True, extend=4)
            return
        old = pack.adapter("a", torch.float64)
        assert pack.add(stranger, same_base=True, extend=4).delta_error < 0.01
        pack.save()
        opened = ex.Pack.open(path)
        assert true_error(stranger, opened) == pytest.approx(opened.records["new"].delta_error, abs=1e-6)
        assert reference.delta_error(old, opened.adapter("a", torch.float64)) < 1e-7
        assert_reads_what_the_library_reads(path)

    def test_refitted_it_is_a_pack_of_coefficients(self, path, sources):
        pack = ex.Pack.open(path)
        found = ex.refit(pack, sources).pack
        assert (found.cores, found.storage, found.coefficient_storage) == (None, pack.storage, pack.storage)
        fitted = ex.fit(sources, n_components=K, dtype=pack.storage)
        assert found.info.fingerprint == fitted.info.fingerprint
        if pack.cores == "full":
            return
        alone = ex.refit(pack, n_components=6)
        originals = {name: ex.read_adapter(sources / name) for name in pack.names}
        for name, record in alone.pack.records.items():
            # a bound, since diagonal cores may lose in any direction
            assert record.bound
            assert true_error(originals[name], alone.pack) <= record.delta_error + 1e-9


def _shapes(pack):
    return {name: (pair["up"].dimension, pair["down"].dimension) for name, pair in pack.info.modules.items()}


def test_what_is_carried_keeps_its_rank(tmp_path):
    """Embeddings have theirs by the config's r, and modules beside the subspace by its patterns."""
    embedding = {
        "base_model.model.embed.lora_embedding_A": torch.randn(6, 41, generator=generator(1)),
        "base_model.model.embed.lora_embedding_B": torch.randn(31, 6, generator=generator(2)),
    }
    rank_pattern, alpha_pattern = {"query": 6, "value": 2, "embed": 6}, {"query": 12}
    make_adapter(tmp_path / "a", seed=1, rank=6, tensors=embedding)
    change_config(tmp_path / "a", rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, r=8)
    change_tensors(tmp_path / "a", _cut_value)
    make_adapter(tmp_path / "b", seed=2)
    pack = fit_with_cores([tmp_path / "a", tmp_path / "b"], "diagonal", n_components=8, exclude_modules=["*value"])
    loras = pack.export(tmp_path / "out")
    config = json.loads((loras["a"] / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]["embed"], config["rank_pattern"]["value"]) == (8, 6, 2)
    for name, ranks in (("a", (8, 2)), ("b", (8, 3))):
        one, source = ex.read_adapter(loras[name]), ex.read_adapter(tmp_path / name)
        for module, spec in one.specs.items():
            assert spec.rank == ranks["value" in module]
            assert spec.scaling == pytest.approx(source.specs[module].scaling)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_files_of_image_models_come_back_in_their_dialect(dialect, tmp_path):
    block = "unet.down_blocks.0"
    shapes = {
        f"{block}.resnets.0.conv1": (7, 5, 3, 3),
        f"{block}.attentions.0.transformer_blocks.0.attn1.to_q": (19, 17),
    }
    files = [
        lora_files.write(tmp_path / f"s{seed}.safetensors", lora_files.planted(shapes, seed=seed), dialect)
        for seed in range(3)
    ]
    pack = fit_with_cores(files, "diagonal", n_components=6, warn_above=1.0)
    for path in pack.export(tmp_path / "out").values():
        found, kept = ex.read_adapter(path), pack.adapter(path.stem)
        assert found.origin.format == dialect
        assert {spec.rank for spec in found.specs.values()} == {6}
        for name, factors in kept.modules.items():
            np.testing.assert_allclose(reference.dense(found.modules[name]), reference.dense(factors), atol=1e-6)


@pytest.mark.parametrize("option", ["dtype", "coefficient_dtype"])
@pytest.mark.parametrize("storage", ["full-float16", "diagonal-float16"])
def test_a_fit_does_not_write_them(option, storage):
    with pytest.raises(OptionError, match=f"{option} {storage} is .* fit does not write. Pass {option}='float16'"):
        ex.fit(random_collection(3), **{option: storage})


@pytest.mark.parametrize("kind", KINDS)
def test_cores_that_a_dtype_has_no_room_for(kind):
    adapters = [changed(one, down=1e3, up=1e3) for one in random_collection(3)]
    with pytest.raises(NonFiniteError, match="exceed torch.float16, .* Store them as float32"):
        fit_with_cores(adapters, kind, n_components=3, dtype="float16")


def test_a_report_is_of_the_pack_and_says_which_figures_are_not():
    adapters = random_collection(5)
    pack = fit_with_cores(adapters, "diagonal", n_components=3)
    made = report(pack, adapters)
    (finding,) = [one for one in made.verdict.findings if one.kind == "cores"]
    assert "stores diagonal cores" in finding.text
    dense = {
        one.name: np.concatenate([reference.dense(f).ravel() for f in pack.adapter(one.name).modules.values()])
        for one in adapters
    }
    for module in made.modules:
        errors = {}
        for one in adapters:
            kept, was = (reference.dense(a.modules[module.name]) for a in (pack.adapter(one.name), one))
            errors[one.name] = np.linalg.norm(was - kept) / np.linalg.norm(was)
        assert module.worst_error == pytest.approx(errors[module.worst], rel=1e-6)
        assert module.worst_error == pytest.approx(max(errors.values()), rel=1e-6)
    alone = report(pack)
    cosines = {
        tuple(sorted((one, other))): float(
            dense[one] @ dense[other] / np.linalg.norm(dense[one]) / np.linalg.norm(dense[other])
        )
        for one in dense
        for other in dense
        if one < other
    }
    assert alone.similarity.mean_cosine == pytest.approx(np.mean(list(cosines.values())), abs=1e-6)
