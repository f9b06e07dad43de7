"""Merges compared with dense float64 implementations on out × in matrices, and with PEFT."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import (
    AdapterNameError,
    BaseModelError,
    FormatError,
    LossWarning,
    ModuleNameError,
    OptionError,
    PackExistsError,
    ShapeError,
)
from eigenlorax.merging.comparison import normal_coordinates
from eigenlorax.merging.coordinates import common_coordinates
from eigenlorax.merging.methods import METHODS
from planted import MODULES, normal, orthonormal, random_factors
from tiny import make_gpt2

RANKS = (2, 5, 3)
WEIGHTS = (1.0, 0.5, 2.0)
CUT = 4
EXACT = 1e-5


def strangers(**fields):
    """Adapters of several ranks and scalings; the second module is in two of them only."""
    query, dense = MODULES
    adapters = []
    for n, rank in enumerate(RANKS):
        modules = {query: random_factors(rank, *MODULES[query], seed=n, scaling=0.5 + n, dtype=torch.float32)}
        if n != 1:
            modules[dense] = random_factors(rank, *MODULES[dense], seed=50 + n, scaling=2.0, dtype=torch.float32)
        adapters.append(from_factors(f"stranger-{n}", modules, base_model="org/base", **fields))
    return adapters


def dense_update(factors):
    return factors.scaling * factors.up.double() @ factors.down.double()


def dense_updates(adapters, module):
    shape = MODULES[module]
    return [
        dense_update(adapter.modules[module]) if module in adapter.specs else torch.zeros(shape, dtype=torch.float64)
        for adapter in adapters
    ]


def cut(matrix, rank=CUT):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]


def truncated(factors, rank):
    """The best approximation of an update by a lower rank, or the factors themselves."""
    if rank >= factors.spec.rank:
        return factors
    left, values, right = torch.linalg.svd(dense_update(factors), full_matrices=False)
    return LoRAFactors(right[:rank].float(), (left[:, :rank] * values[:rank]).float(), 1.0)


def dense_tsv(updates, weights):
    """TSV-Merge on out × in matrices: at most min / n components of each, orthogonalised by polar factors."""
    lefts, values, rights = [], [], []
    for update, weight in zip(updates, weights, strict=True):
        left, sigma, right = torch.linalg.svd(update, full_matrices=False)
        rank = min(int((sigma > 1e-6 * sigma[0]).sum()), min(update.shape) // len(updates))
        lefts.append(left[:, :rank])
        values.append(weight * sigma[:rank])
        rights.append(right[:rank])
    polar = []
    for vectors in (torch.cat(lefts, 1), torch.cat(rights)):
        left, sigma, right = torch.linalg.svd(vectors, full_matrices=False)
        rank = int((sigma > 1e-5 * sigma[0]).sum())
        polar.append(left[:, :rank] @ right[:rank])
    return polar[0] @ torch.diag(torch.cat(values)) @ polar[1]


def dense_iso_c(updates, weights, rank=CUT):
    """Iso-C on out × in matrices; the singular vectors of singular values that are zero have no direction."""
    left, sigma, right = torch.linalg.svd(weighted_sum(updates, weights), full_matrices=False)
    mean = sigma[sigma > 1e-10].mean()
    return mean * left[:, :rank] @ right[:rank]


def weighted_sum(updates, weights):
    return sum(weight * update for weight, update in zip(weights, updates, strict=True))


DENSE = {
    "mean": lambda updates, weights: cut(weighted_sum(updates, weights) / sum(weights)),
    "task-arithmetic": lambda updates, weights: cut(weighted_sum(updates, weights)),
    "tsv": lambda updates, weights: cut(dense_tsv(updates, weights)),
    "iso-c": dense_iso_c,
}


def assert_close(found, wanted, tolerance=EXACT):
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("method", DENSE)
def test_methods_without_coordinates_equal_the_full_matrices(method, module):
    adapters = strangers()
    merged = ex.merge(adapters, method, weights=WEIGHTS, rank=CUT).adapter
    assert_close(dense_update(merged.modules[module]), DENSE[method](dense_updates(adapters, module), WEIGHTS))
    assert merged.ranks == (CUT,)


@pytest.mark.parametrize("method", DENSE)
def test_adapters_of_one_start_equal_the_full_matrices(method):
    """Their factors A are almost equal, so that small directions are real, and not rounding errors."""
    module, (n_out, n_in) = next(iter(MODULES.items()))
    start = normal(3, n_in, seed=1)
    decay = torch.tensor([1.0, 0.03, 0.012], dtype=torch.float64)
    adapters = [
        from_factors(
            name,
            {
                module: LoRAFactors(
                    (start + 2e-4 * normal(3, n_in, seed=n)).float(),
                    (normal(n_out, 3, seed=9 + n) * decay).float(),
                    1.0,
                )
            },
        )
        for n, name in enumerate("abc")
    ]
    merged = ex.merge(adapters, method, weights=WEIGHTS, rank=CUT)
    assert_close(dense_update(merged.adapter.modules[module]), DENSE[method](dense_updates(adapters, module), WEIGHTS))


@pytest.mark.slow
@pytest.mark.parametrize("method", DENSE)
def test_strangers_of_mixed_ranks_equal_the_full_matrices(method, shared):
    """GPT-2 adapters of three authors; the first one is cut to rank 3."""
    folders = sorted((shared / "zoo/gpt2").iterdir())
    modules = ("transformer.h.0.attn.c_attn", "transformer.h.11.mlp.c_proj")
    adapters = []
    for rank, folder in zip((3, 8, 8, 8, 8), folders, strict=True):
        stranger = ex.read_adapter(folder)
        factors = {module: truncated(stranger.modules[module], rank) for module in modules}
        adapters.append(from_factors(folder.name, factors, base_model="gpt2"))
    weights = (1.0, 0.5, 2.0, 1.0, 0.7)
    merged = ex.merge(adapters, method, weights=weights, rank=CUT).adapter
    for module in modules:
        updates = [dense_update(adapter.modules[module]) for adapter in adapters]
        assert_close(dense_update(merged.modules[module]), DENSE[method](updates, weights))


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_does_not_depend_on_how_updates_are_factored_or_on_their_order(method):
    adapters = strangers()
    gauge = torch.linalg.inv(normal(5, 5, seed=3))

    def refactored(adapter):
        modules = {}
        for module, factors in adapter.modules.items():
            mix = gauge[: factors.spec.rank, : factors.spec.rank]
            down, up = mix @ factors.down.double(), factors.up.double() @ torch.linalg.inv(mix)
            modules[module] = LoRAFactors(down, up, factors.scaling)
        return from_factors(adapter.name, modules, base_model=adapter.base_model)

    # DARE drops entries by their place, and the order of adapters is part of that
    others = [refactored(adapter) for adapter in (adapters if method == "dare" else adapters[::-1])]
    weights = WEIGHTS if method == "dare" else WEIGHTS[::-1]
    found = ex.merge(others, method, weights=weights, rank=CUT).adapter
    wanted = ex.merge(adapters, method, weights=WEIGHTS, rank=CUT).adapter
    for module in MODULES:
        # signs of singular vectors are arbitrary, and none of the methods but DARE depends on them
        assert_close(dense_update(found.modules[module]), dense_update(wanted.modules[module]), 1e-4)


def test_ties_is_that_of_peft_in_the_coordinates():
    adapters, (module, _) = strangers(), MODULES
    coordinates = common_coordinates([adapter.modules[module] for adapter in adapters])
    for core, update in zip(coordinates.cores, dense_updates(adapters, module), strict=True):
        assert_close(coordinates.up.mT @ core @ coordinates.down, update, 1e-12)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    wanted = merge_utils.ties(list(coordinates.cores), weights, density=0.3)
    found = ex.merge(adapters, "ties", weights=WEIGHTS, rank=10, density=0.3).adapter
    assert_close(dense_update(found.modules[module]), coordinates.up.mT @ wanted @ coordinates.down)


def test_dare_is_the_sum_of_rescaled_entries_in_the_coordinates():
    adapters, (module, _) = strangers(), MODULES
    merged = ex.merge(adapters, "dare", rank=10, density=0.25, seed=9).adapter
    coordinates = common_coordinates([adapter.modules[module] for adapter in adapters])
    found = coordinates.up @ dense_update(merged.modules[module]) @ coordinates.down.mT
    sums = [
        sum(4 * core for core in chosen)
        for size in range(4)
        for chosen in itertools.combinations(coordinates.cores, size)
    ]
    distances = torch.stack([(found - (total if size else 0 * found)).abs() for size, total in enumerate(sums)])
    assert (distances.min(0).values < 1e-4 * found.norm()).all()
    # each entry is kept with probability .25
    assert (found == 0).double().mean() < 1
    kept = sum((found - 4 * core).abs() < 1e-4 * found.norm() for core in coordinates.cores)
    assert 0.1 < float((kept > 0).double().mean()) < 0.9


def test_knots_is_ties_of_the_right_parts_of_one_svd():
    adapters, (module, _) = strangers(), MODULES
    updates = dense_updates(adapters, module)
    left, sigma, right = torch.linalg.svd(torch.cat(updates, 1), full_matrices=False)
    parts = list((torch.diag(sigma) @ right)[: sum(RANKS)].split(MODULES[module][1], dim=1))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    wanted = left[:, : sum(RANKS)] @ merge_utils.ties(parts, weights, density=0.4)
    found = ex.merge(adapters, "knots", weights=WEIGHTS, rank=10, density=0.4).adapter
    assert_close(dense_update(found.modules[module]), wanted)


def test_what_a_merge_keeps_of_each_source():
    adapters, module = strangers(), "encoder.0.query"
    merged = ex.merge(adapters, "mean", weights=WEIGHTS, rank=10)
    comparison = merged.comparison
    flat = torch.stack([torch.cat([dense_updates([one], name)[0].flatten() for name in MODULES]) for one in adapters])
    total = torch.cat([dense_update(merged.adapter.modules[name]).flatten() for name in MODULES])
    for source, update in zip(comparison.sources, flat, strict=True):
        assert source.norm == pytest.approx(float(update.norm()))
        assert source.kept == pytest.approx(float(total @ update / update.square().sum()), rel=1e-5)
        assert source.cosine == pytest.approx(float(total @ update / update.norm() / total.norm()), rel=1e-5)
        assert source.kept_by_mean == pytest.approx(source.kept, rel=1e-6)
        # weights of 1, .5 and 2 out of 3.5, and random adapters are nearly orthogonal
    for source, weight in zip(comparison.sources, WEIGHTS, strict=True):
        assert source.kept_among_random == pytest.approx(weight / 3.5, abs=0.1)
    assert comparison.norm == pytest.approx(float(total.norm()), rel=1e-5)
    pair = next(pair for pair in comparison.pairs if (pair.first, pair.second) == ("stranger-0", "stranger-1"))
    assert pair.cosine == pytest.approx(float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()), rel=1e-5)
    rows = [torch.linalg.qr(adapter.modules[module].down.double().mT)[0] for adapter in adapters]
    assert pair.input_overlap == pytest.approx(float((rows[0].mT @ rows[1]).square().sum() / 2), rel=1e-6)


def test_coordinates_of_random_factors_are_distributed_as_the_factors():
    n, dimension, fixed, samples = 3, 11, 2, 4000
    numbers = np.random.default_rng(0)
    rows = [normal_coordinates(n, dimension, fixed, numbers) for _ in range(samples)]
    assert rows[0].shape == (n, fixed + n)
    grams = np.stack([each @ each.T for each in rows])
    # moments of the Wishart distribution with 11 degrees of freedom
    np.testing.assert_allclose(grams.mean(0), dimension * np.eye(n), atol=0.35)
    np.testing.assert_allclose(grams.var(0), dimension * (1 + np.eye(n)), rtol=0.12)
    np.testing.assert_allclose(np.stack(rows)[:, :, :fixed].var(0), 1, rtol=0.12)
    assert normal_coordinates(9, dimension, fixed, numbers).shape == (9, dimension)


@pytest.mark.parametrize("method", ["ties", "tsv", "knots"])
def test_the_share_kept_among_random_adapters_is_that_of_wide_random_adapters(method):
    """The same mean over many seeds as merges with random factors as wide as the module."""
    module, shape = next(iter(MODULES.items()))
    adapters = [from_factors(f"s{n}", {module: random_factors(r, *shape, seed=n)}) for n, r in enumerate((2, 5, 3))]
    update = dense_updates(adapters, module)[0]
    found, wanted = [], []
    for seed in range(15):
        found.append(ex.merge(adapters, method, seed=seed).comparison.sources[0].kept_among_random)
        others = []
        for place, adapter in enumerate(adapters[1:]):
            random = random_factors(adapter.ranks[0], *shape, seed=1000 + 10 * seed + place)
            norm = dense_update(adapter.modules[module]).norm() / dense_update(random).norm()
            others.append(
                from_factors(adapter.name, {module: LoRAFactors(random.down, norm * random.up, random.scaling)})
            )
        merged = ex.merge([adapters[0], *others], method)
        wanted.append(float((dense_update(merged.adapter.modules[module]) * update).sum() / update.square().sum()))
    spread = math.sqrt((np.var(found) + np.var(wanted)) / 15)
    assert abs(np.mean(found) - np.mean(wanted)) < 4 * spread + 1e-3


def test_conflicting_signs_are_counted():
    module, shape = next(iter(MODULES.items()))
    update = random_factors(2, *shape, seed=1)
    against = LoRAFactors(update.down, -0.5 * update.up, update.scaling)
    adapters = [from_factors(name, {module: one}) for name, one in (("for", update), ("against", against))]
    sources = ex.merge(adapters, "ties", density=1.0).comparison.sources
    assert [source.sign_agreement for source in sources] == pytest.approx([1.0, 0.0], abs=1e-9)
    assert [source.kept for source in sources] == pytest.approx([1.0, -2.0])


def test_the_error_of_the_cut_is_measured_over_all_modules():
    adapters = strangers()
    whole = ex.merge(adapters, "task-arithmetic", rank=10)
    assert (whole.full_rank, whole.cut_error) == (10, pytest.approx(0.0, abs=1e-7))
    merged = ex.merge(adapters, "task-arithmetic", rank=CUT)
    squares = {
        name: torch.linalg.svdvals(weighted_sum(dense_updates(adapters, name), [1.0] * 3)).square() for name in MODULES
    }
    lost = sum(float(values[CUT:].sum()) for values in squares.values())
    assert merged.cut_error == pytest.approx(math.sqrt(lost / sum(float(v.sum()) for v in squares.values())))


def test_the_default_rank_is_the_largest_of_a_source():
    assert ex.merge(strangers()).adapter.ranks == (max(RANKS),)


TOKENS = torch.tensor([[5, 9, 3, 41], [7, 7, 2, 18]])


@pytest.fixture
def trained_loras(tmp_path):
    """Two LoRAs of a GPT-2, with other ranks, scalings and modules, as PEFT saves them, and the model with both."""
    model = make_gpt2()
    for n, (name, rank, targets) in enumerate((("small", 2, ["c_attn"]), ("large", 5, ["c_attn", "c_proj"]))):
        config = LoraConfig(r=rank, lora_alpha=3 + n, target_modules=targets, task_type="CAUSAL_LM", use_rslora=n == 1)
        if n == 0:
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    return model, [tmp_path / "small", tmp_path / "large"]


def test_the_result_loads_in_peft_with_the_logits_of_the_summed_updates(trained_loras, tmp_path):
    model, folders = trained_loras
    saved = ex.merge(folders, "task-arithmetic", weights=[0.5, 2.0], rank=7).save(tmp_path / "merged")
    wanted = make_gpt2()
    for name, layer in model.named_modules():
        for adapter, weight in (("small", 0.5), ("large", 2.0)):
            if adapter in getattr(layer, "lora_A", {}):
                place = wanted.get_submodule(name.removeprefix("base_model.model."))
                place.weight.data += weight * layer.get_delta_weight(adapter)
    loaded = PeftModel.from_pretrained(make_gpt2(), saved)
    torch.testing.assert_close(loaded(TOKENS).logits, wanted(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert json.loads((saved / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_the_sum_is_that_of_peft(trained_loras):
    model, folders = trained_loras
    model.add_weighted_adapter(["small", "large"], [1.0, 1.0], "sum", combination_type="cat")
    merged = ex.merge(folders, "task-arithmetic", rank=7).adapter
    compared = 0
    for name, layer in model.named_modules():
        if "sum" in getattr(layer, "lora_A", {}):
            found = dense_update(merged.modules[name.removeprefix("base_model.model.")])
            # PEFT turns the update of GPT-2's layers around, whose weights are (in, out)
            assert_close(found.mT, layer.get_delta_weight("sum").double(), 1e-5)
            compared += 1
    assert compared == 6


def with_heads(tmp_path):
    return [make_adapter(tmp_path / name, seed=seed, head=(3, 7)) for seed, name in enumerate("ab")]


def test_heads_are_kept_by_name_and_one_may_be_chosen(tmp_path):
    sources = with_heads(tmp_path)
    merged = ex.merge(sources)
    assert not merged.adapter.heads
    folder = merged.save(tmp_path / "merged")
    for source in sources:
        stored = load_file(folder / f"head.{source.name}.safetensors")
        wanted = ex.read_adapter(source).heads
        assert stored.keys() == wanted.keys()
        assert all(torch.equal(stored[key], wanted[key]) for key in wanted)
    chosen = ex.read_adapter(ex.merge(sources, head="b").save(tmp_path / "chosen"))
    assert chosen.heads.keys() == merged.heads["b"].keys()
    assert all(torch.equal(chosen.heads[key], merged.heads["b"][key]) for key in chosen.heads)
    assert chosen.config["modules_to_save"] == ["classifier"]


def test_a_merge_is_not_written_over_another_folder(tmp_path):
    merged = ex.merge(strangers())
    merged.save(tmp_path / "merged")
    with pytest.raises(PackExistsError, match="exists"):
        merged.save(tmp_path / "merged")
    assert ex.read_adapter(merged.save(tmp_path / "merged", overwrite=True)).ranks == (max(RANKS),)


def test_adapters_of_a_pack_are_merged_and_added(tmp_path):
    adapters = strangers()
    pack = ex.fit(adapters, n_components=CUT, dtype="float32")
    with pytest.warns(LossWarning, match="error is above 0.1 for .* Merge their originals"):
        merged = pack.merge([adapter.name for adapter in adapters], "tsv", rank=CUT)
    # of what the pack holds, in which a basis of so few components misses a part
    stored = [pack[adapter.name] for adapter in adapters]
    for module in MODULES:
        wanted = cut(dense_tsv(dense_updates(stored, module), [1.0] * 3))
        assert_close(dense_update(merged.adapter.modules[module]), wanted)
    record = pack.add(merged.adapter, name="merged", residual=True)
    assert record.delta_error < 1e-6
    assert pack.names == ["merged", *(adapter.name for adapter in adapters)]


def test_untrained_adapters_and_equal_ones():
    module, shape = next(iter(MODULES.items()))
    update = random_factors(2, *shape, seed=1)
    zero = LoRAFactors(update.down, torch.zeros_like(update.up), 1.0)
    adapters = [from_factors(name, {module: one}) for name, one in (("a", update), ("b", update), ("zero", zero))]
    for method in METHODS:
        merged = ex.merge(adapters, method)
        kept = {source.name: source.kept for source in merged.comparison.sources}
        assert kept["zero"] is None
        assert kept["a"] == pytest.approx(kept["b"])
        assert dense_update(merged.adapter.modules[module]).isfinite().all()
    nothing = ex.merge([from_factors("x", {module: zero}), from_factors("y", {module: zero})], "iso-c")
    assert nothing.cut_error == 0.0
    assert not dense_update(nothing.adapter.modules[module]).any()


def test_a_merge_of_equal_adapters_by_the_mean_is_that_adapter():
    module, shape = next(iter(MODULES.items()))
    update = random_factors(2, *shape, seed=1)
    adapters = [from_factors(name, {module: update}) for name in "ab"]
    assert_close(dense_update(ex.merge(adapters).adapter.modules[module]), dense_update(update))


@pytest.mark.parametrize("method", METHODS)
def test_rounding_errors_of_factors_are_no_directions(method):
    """Adapters in one shared span: their float32 factors leave it by rounding errors, which must not be made larger."""
    module, (n_out, n_in) = next(iter(MODULES.items()))
    rows, columns = orthonormal(4, n_in, 3), orthonormal(5, n_out, 4)
    exact = [
        LoRAFactors(normal(3, 4, seed=n) @ rows, (normal(3, 5, seed=n + 9) @ columns).mT.contiguous(), 1.0)
        for n in range(3)
    ]
    rounded = [LoRAFactors(one.down.float(), one.up.float(), 1.0) for one in exact]
    results = [
        ex.merge([from_factors(name, {module: one}) for name, one in zip("abc", updates, strict=True)], method, rank=4)
        for updates in (exact, rounded)
    ]
    assert results[0].full_rank == results[1].full_rank <= 5
    assert_close(*(dense_update(result.adapter.modules[module]) for result in results), 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_padded_factors_change_nothing(method):
    def padded(factors):
        down = torch.cat([factors.down, torch.zeros(4, factors.down.shape[1])])
        return LoRAFactors(down, torch.cat([factors.up, torch.zeros(len(factors.up), 4)], 1), factors.scaling)

    adapters = strangers()
    others = [
        from_factors(one.name, {name: padded(factors) for name, factors in one.modules.items()}, base_model="org/base")
        for one in adapters
    ]
    found, wanted = (ex.merge(each, method, rank=CUT).adapter for each in (others, adapters))
    for module in MODULES:
        assert_close(dense_update(found.modules[module]), dense_update(wanted.modules[module]), 1e-4)


def test_more_adapters_than_a_module_has_outputs():
    adapters = [from_factors(name, {"score": random_factors(1, 2, 11, seed=n)}) for n, name in enumerate("abc")]
    merged = ex.merge(adapters, "tsv", rank=2)
    assert merged.comparison.norm > 1.0


def test_weights_that_add_up_to_zero():
    adapters, module = strangers(), "encoder.0.query"
    with pytest.raises(OptionError, match="mean divides by the sum of the weights"):
        ex.merge(adapters, weights=[0.1, 0.2, -0.3])
    merged = ex.merge(adapters[:2], "task-arithmetic", weights=[1.0, -1.0], rank=7)
    first, second = dense_updates(adapters[:2], module)
    assert_close(dense_update(merged.adapter.modules[module]), first - second)
    assert all(0.3 < source.kept_by_mean < 0.7 for source in merged.comparison.sources)


def test_the_chosen_head_decides_on_the_task(tmp_path):
    writer = make_adapter(tmp_path / "writer", seed=1, config={"task_type": "CAUSAL_LM"})
    classifier = make_adapter(tmp_path / "classifier", seed=2, head=(3, 7), config={"task_type": "SEQ_CLS"})
    assert ex.merge([writer, classifier]).adapter.config["task_type"] == "CAUSAL_LM"
    assert ex.merge([writer, classifier], head="classifier").adapter.config["task_type"] == "SEQ_CLS"


def test_convolutions_keep_their_kernel():
    kernel = (3, 3)
    adapters = [
        from_factors(name, {"down.conv": LoRAFactors(normal(r, 5 * 9, seed=r), normal(11, r, seed=r + 9), 1.5, kernel)})
        for name, r in (("a", 2), ("b", 3))
    ]
    merged = ex.merge(adapters, "task-arithmetic", rank=5).adapter
    assert merged.modules["down.conv"].kernel == kernel
    wanted = sum(dense_update(adapter.modules["down.conv"]) for adapter in adapters)
    assert_close(dense_update(merged.modules["down.conv"]), wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "tie"}, OptionError, "method must be one of mean, .*got 'tie'. Did you mean 'ties'"),
        ({"weights": [1.0]}, OptionError, "weights has 1 numbers for 3 adapters"),
        ({"weights": [1.0, -1.0, 0.0]}, OptionError, "mean divides by the sum of the weights, which must not be zero"),
        ({"weights": [1.0, math.nan, 0.0]}, OptionError, "weights must be finite"),
        ({"weights": [1.0, "2", 0.0]}, OptionError, "a weight must be a number, got '2'"),
        ({"rank": 0}, OptionError, "rank must be from 1 to 37, .* got 0"),
        ({"rank": 38}, OptionError, "rank must be from 1 to 37, .* got 38"),
        ({"rank": 2.5}, OptionError, "rank must be an integer"),
        ({"method": "ties", "density": 0.0}, OptionError, "density must be above 0 and at most 1, got 0"),
        ({"method": "tsv", "density": 0.5}, OptionError, "tsv keeps all entries: density is an option of ties"),
        ({"head": "nobody"}, AdapterNameError, "no adapter 'nobody' whose head could be used. There are: stranger-0"),
        ({"name": 3}, OptionError, "name must be a text, got 3"),
        ({"weights": 2.0}, OptionError, "weights must be a list of numbers, got 2.0"),
        ({"weights": "1,1"}, OptionError, "weights must be a list of numbers, got '1,1'"),
        ({"method": None}, OptionError, "method must be one of mean, .*got None"),
        ({"seed": "x"}, OptionError, "seed must be an integer"),
        ({"name": "a/b"}, AdapterNameError, "adapter name 'a/b' is not allowed"),
    ],
)
def test_options_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        ex.merge(strangers(), **arguments)


def test_what_cannot_be_merged():
    one, two, _ = strangers()
    with pytest.raises(OptionError, match="at least two adapters, got 1"):
        ex.merge([one])
    with pytest.raises(AdapterNameError, match="'stranger-0' is listed twice. List it once, with a larger weight"):
        ex.merge([one, two, one])
    module = next(iter(MODULES))
    with pytest.raises(BaseModelError, match="different base models"):
        ex.merge([one, from_factors("other", dict(two.modules), base_model="org/another")])
    with pytest.raises(ShapeError, match=f"module {module}"):
        ex.merge([one, from_factors("wide", {module: random_factors(2, 5, 7, seed=1)}, base_model="org/base")])
    dora = from_factors(
        "dora", dict(two.modules), carried={f"base_model.model.{module}.lora_magnitude_vector": torch.ones(5)}
    )
    with pytest.raises(FormatError, match="'dora' has tensors that are no update .*lora_magnitude_vector"):
        ex.merge([one, dora])
    merged = ex.merge([one, from_factors("other", dict(two.modules), base_model="org/b")], same_base=True)
    assert merged.adapter.base_model in ("org/base", "org/b")


def test_adapters_without_a_common_module_are_no_merge():
    adapters = [from_factors(name, {f"layer.{name}": random_factors(2, 7, 11, seed=1)}) for name in "ab"]
    with pytest.raises(ModuleNameError, match=r"no two of the 2 adapters have a module in common: 'a' has .*layer\.a"):
        ex.merge(adapters)


def test_the_errors_on_other_models_are_those_of_a_merge():
    query, dense = MODULES
    one = from_factors("one", {query: random_factors(2, *MODULES[query], seed=1)}, base_model="org/base")
    other = from_factors("other", {query: random_factors(2, *MODULES[query], seed=2)}, base_model="org/other")
    wide = from_factors("wide", {query: random_factors(2, *MODULES[dense], seed=2)}, base_model="org/base")
    for second, error in ((other, BaseModelError), (wide, ShapeError)):
        with pytest.raises(error, match="Only adapters of one base model can be merged. Leave the others out"):
            ex.merge([one, second])


def test_trained_biases_stay_with_the_head(tmp_path):
    bias = {"bias": "lora_only"}
    folders = [make_adapter(tmp_path / name, seed=seed, head=(3, 7), config=bias) for seed, name in enumerate("ab")]
    assert ex.merge(folders, head="b").adapter.config["bias"] == "lora_only"
    assert ex.merge(folders).adapter.config.get("bias", "none") == "none"


def test_image_loras_of_one_format_become_a_file_of_it(tmp_path):
    conv = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    files = []
    for seed, name in enumerate("ab"):
        adapter = from_factors(name, {conv: random_factors(2, 320, 320, seed=seed, dtype=torch.float32)})
        files.append(ex.write_adapter(adapter, tmp_path / f"{name}.safetensors", format="kohya"))
    merged = ex.merge(files, rank=4)
    written = ex.read_adapter(merged.save(tmp_path / "merged.safetensors"))
    assert written.origin.format == "kohya"
    wanted = sum(dense_update(ex.read_adapter(file).modules[conv]) for file in files) / 2
    assert_close(dense_update(written.modules[conv]), wanted)
    folder = ex.read_adapter(merged.save(tmp_path / "folder"))
    assert list(folder.specs) == [conv.removeprefix("unet.")]
    with pytest.raises(OptionError, match="is a file, which the result can be if all sources are image LoRAs"):
        ex.merge(strangers()).save(tmp_path / "other.safetensors")


def test_adapters_of_mlx_lm_become_a_folder_of_peft(tmp_path):
    for name in ("a", "b"):
        modules = {"model.layers.0.mlp.up_proj": random_factors(2, 7, 11, seed=ord(name))}
        ex.write_adapter(from_factors(name, modules), tmp_path / name, format="mlx")
    merged = ex.merge([tmp_path / "a", tmp_path / "b"], rank=4)
    saved = ex.read_adapter(merged.save(tmp_path / "merged"))
    # what mlx-lm trains, which the config of a new adapter would not say
    assert saved.config["task_type"] == "CAUSAL_LM"
    for module, factors in merged.adapter.modules.items():
        assert torch.equal(saved.modules[module].up, factors.up)
