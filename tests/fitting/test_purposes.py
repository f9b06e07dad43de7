"""Purposes of a pack: the target and the storage that each one chooses, and what is said of them."""

import re
from dataclasses import replace

import pytest
import torch

import eigenlorax as ex
import reference
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.errors import OptionError
from eigenlorax.pack import purposes
from planted import factors_in, orthonormal, random_adapter

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")

MODULES = {"encoder.0.query": (160, 96), "encoder.0.dense": (224, 128)}


def shared(n, noise):
    """Adapters of rank 4 that share 7 directions on each side, but for noise."""
    bases = {
        name: (orthonormal(7, n_in, 3 + i), orthonormal(7, n_out, 83 + i))
        for i, (name, (n_out, n_in)) in enumerate(MODULES.items())
    }
    adapters = []
    for index in range(n):
        modules = {}
        for offset, name in enumerate(MODULES):
            factors = factors_in(bases[name], 4, seed=1000 + 100 * index + 10 * offset, noise=noise)
            modules[name] = LoRAFactors(factors.down.half(), factors.up.half(), factors.scaling)
        adapters.append(ex.from_factors(f"adapter-{index}", modules, base_model="org/base"))
    return adapters


def unrelated(n):
    return [
        random_adapter(f"adapter-{index}", 7000 + 50 * index, rank=4, modules=MODULES, dtype=torch.float16)
        for index in range(n)
    ]


COLLECTIONS = {
    "shared": lambda: shared(12, 0.0),
    "shared, noisy": lambda: shared(12, 0.05),
    "unrelated": lambda: unrelated(6),
    "few": lambda: unrelated(3),
}


@pytest.fixture(scope="module")
def adapters():
    return shared(6, 0.05)


class TestWhatIsChosen:
    def test_by_default_for_storage(self, adapters):
        pack = ex.fit(adapters)
        assert pack.is_coded
        assert (pack.fit_info.purpose, pack.fit_info.max_error) == ("storage", 0.1)
        assert pack.summary.in_fit.worst <= 0.1

    def test_storage_is_the_default(self, adapters, tmp_path):
        for name, options in (("one", {}), ("other", {"purpose": "storage"})):
            ex.fit(adapters, **options).save(tmp_path / name)
        one, other = (
            {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
            for name in ("one", "other")
        )
        assert one == other

    def test_for_training(self, adapters):
        pack = ex.fit(adapters, purpose="training")
        assert (pack.fit_info.purpose, pack.fit_info.n_components) == ("training", 32)
        assert (pack.storage, pack.coefficient_storage) == ("float16", "float16")

    def test_for_serving_one_basis_holds_every_adapter_within_the_bound(self, adapters):
        for collection in (adapters, unrelated(3)):
            pack = ex.fit(collection, purpose="serving")
            assert (pack.fit_info.purpose, pack.fit_info.max_error) == ("serving", 0.1)
            assert pack.storage == "float16"
            assert 0 < pack.summary.in_fit.worst <= 0.1
            assert not any(c.has_residual for name in pack.names for c in pack.packed(name).coefficients.values())
            assert not any("without a dtype" in note for note in pack.notes)

    @pytest.mark.parametrize("purpose", ["storage", "training", "serving"])
    def test_a_refit_keeps_the_purpose_of_modules_that_are_narrower_than_the_default(self, purpose):
        pack = ex.fit(
            [random_adapter(name, seed, modules={"l.0": (15, 20)}) for seed, name in enumerate("ab")], purpose=purpose
        )
        again = ex.refit(pack).pack
        assert (again.fit_info.purpose, again.storage) == (purpose, pack.storage)

    @pytest.mark.parametrize("purpose", ["training", "serving"])
    def test_the_error_after_rounding_is_close_to_that_of_float32(self, adapters, purpose):
        size = {"n_components": 9}
        wide, narrow = (ex.fit(adapters, purpose=purpose, dtype=dtype, **size) for dtype in ("float32", None))
        assert narrow.summary.in_fit.worst == pytest.approx(wide.summary.in_fit.worst, abs=1e-3)
        assert narrow.summary.in_fit.rounding_worst < 1e-3

    @pytest.mark.parametrize(
        ("options", "purpose", "expected"),
        [
            ({"n_components": 5}, None, {"n_components": 5, "dtype": "float16"}),
            ({"n_components": 5, "dtype": "float32"}, None, {"n_components": 5, "dtype": "float32"}),
            ({"max_error": 0.2}, None, {"max_error": 0.2, "dtype": "coded"}),
            ({"n_components": 5}, "storage", {"n_components": 5, "dtype": "float16"}),
            ({"ratio": 12.0}, "storage", {"ratio": 12.0, "dtype": "coded"}),
            ({"dtype": "float32"}, "storage", {"max_error": 0.1, "dtype": "float32"}),
            ({"n_components": 5}, "training", {"n_components": 5, "dtype": "float16"}),
            ({"n_components": "auto"}, "training", {"auto": True, "dtype": "float16"}),
            ({"dtype": "int8"}, "training", {"n_components": 32, "dtype": "int8"}),
            ({"dtype": "bfloat16"}, "training", {"n_components": 32, "dtype": "bfloat16"}),
            ({"energy": 0.9}, "serving", {"energy": 0.9, "dtype": "float16"}),
            ({"max_error": 0.3}, "serving", {"max_error": 0.3, "dtype": "float16"}),
        ],
    )
    def test_options_that_are_passed_come_first(self, adapters, options, purpose, expected):
        pack = ex.fit(adapters, purpose=purpose, warn_above=1.0, **options)
        dtype = expected.pop("dtype")
        assert (pack.fit_info.purpose, pack.storage) == (purpose, dtype)
        assert {name: getattr(pack.fit_info, name) for name in expected} == expected

    def test_a_dtype_alone_leaves_the_error_bound(self, adapters):
        pack = ex.fit(adapters, dtype="float32")
        assert (pack.fit_info.purpose, pack.fit_info.max_error, pack.storage) == ("storage", 0.1, "float32")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"purpose": "serve"}, "purpose must be one of storage, training, serving, got 'serve'. Did you mean"),
            ({"purpose": "training", "ratio": 9}, "ratio=9 means entropy coding, .* for training. Pass n_components"),
            ({"purpose": "serving", "max_bytes": 99}, "max_bytes=99 means .* purpose='storage' .--for storage"),
            ({"purpose": "serving", "dtype": "coded"}, "dtype coded means entropy coding, .* no basis for serving"),
            ({"dtype": "int8"}, r"dtype int8 needs a number of components: pass n_components=32 \(-k 32\)"),
            ({"purpose": "serving", "coefficient_dtype": "int4"}, "dtype int4 needs a number of components"),
            ({"sweeps": 3}, "sweeps=3 has no effect with the default target, max_error=0.1, .* pass n_components"),
            ({"purpose": "storage", "energy": 0.5, "ratio": 3.0}, "exactly one of"),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, adapters, options, message):
        with pytest.raises(OptionError, match=message):
            ex.fit(adapters, **options)

    def test_a_refit_keeps_purpose_and_target(self, adapters):
        for purpose in ("storage", "training", "serving"):
            pack = ex.fit(adapters, purpose=purpose)
            again = ex.refit(pack, adapters).pack
            assert (again.fit_info, again.storage) == (pack.fit_info, pack.storage)
            assert ex.refit(pack, adapters, n_components=4, warn_above=1.0).pack.fit_info.purpose is None


class TestWhatIsSaid:
    def test_of_a_basis(self):
        summary = ex.fit(shared(6, 0.0), basis=7).summary
        assert purposes.limits(summary).startswith(
            f"new tasks train on its basis, which takes {summary.bytes.training_basis:,} bytes. vLLM's shared basis"
        )

    def test_of_one_adapter(self):
        limits = purposes.limits(ex.fit(unrelated(1), purpose="training").summary)
        assert limits == (
            "larger than the LoRA, because one adapter has nothing to share its basis with. purpose='storage' (--for "
            "storage) keeps all within 0.1 in fewer bytes"
        )

    @pytest.mark.parametrize(
        ("collection", "options", "choice", "limits"),
        [
            (
                "shared",
                {},
                "for storage: .* at most 0.1, in as few bytes as",
                "^not for training .* nor for vLLM's shared basis. For both",
            ),
            ("shared", {"max_error": 0.2}, "^every adapter's delta error at most 0.2, in as few", "^not for training"),
            ("shared", {"ratio": 9.0}, "^at least 9 times smaller .*, with the smallest errors", "^not for training"),
            (
                "unrelated",
                {"purpose": "training", "n_components": 9},
                "^for training: at most 9 .* float16: new tasks",
                r"^not in place of the originals: an adapter loses up to 0\.\d+ of its update\. purpose='storage' \(",
            ),
            (
                "few",
                {"n_components": 12},
                "^at most 12 components, stored as float16$",
                "^larger than the LoRAs, .*fewer",
            ),
            (
                "shared",
                {"n_components": 7, "dtype": "int8"},
                "^at most 7 components, stored as int8$",
                "more bytes than",
            ),
        ],
    )
    def test_of_each_kind_of_pack(self, collection, options, choice, limits):
        summary = ex.fit(COLLECTIONS[collection](), warn_above=1.0, **options).summary
        assert re.search(choice, purposes.choice(summary))
        assert re.search(limits, purposes.limits(summary))


@pytest.mark.slow
@pytest.mark.parametrize("collection", COLLECTIONS)
def test_no_option_takes_fewer_bytes_at_the_same_worst_error(collection):
    adapters = COLLECTIONS[collection]()
    default = ex.fit(adapters).summary
    assert default.in_fit.worst <= 0.1
    compared = []
    for options in options_of_fit():
        summary = ex.fit(adapters, warn_above=1.0, **options).summary
        if summary.in_fit.worst <= 0.1:
            compared.append(options)
            assert default.bytes.pack <= summary.bytes.pack, options
    assert len(compared) >= 8


def options_of_fit():
    for dtype in ("float32", "float16", "int8", "int4"):
        yield from ({"n_components": k, "dtype": dtype} for k in (6, 7, 12, 24))
        yield from ({"energy": energy, "dtype": dtype} for energy in (0.98, 0.99, 1.0))
    yield from ({"max_error": 0.1, "dtype": dtype} for dtype in ("float32", "float16"))
    yield from ({"max_error": error} for error in (0.02, 0.09))
    yield from ({"ratio": ratio} for ratio in (2.0, 4.0))
    yield {"n_components": "auto", "dtype": "float16"}
    yield {"weighting": "factors"}


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_rounding_each_factor_takes_more_bytes_at_the_same_worst_error(collection):
    adapters = COLLECTIONS[collection]()
    size = ex.fit(adapters).summary.bytes.pack
    for bits in range(2, 9):
        rounded = [rounded_to(adapter, bits) for adapter in adapters]
        if max(reference.delta_error(*pair) for pair in zip(adapters, rounded, strict=True)) <= 0.1:
            # one scale of 16 bits for each row of A and each column of B
            numbers = sum(spec.numbers for adapter in adapters for spec in adapter.specs.values())
            rows = sum(2 * spec.rank for adapter in adapters for spec in adapter.specs.values())
            assert size < numbers * bits / 8 + 2 * rows
            return
    pytest.fail("8 bits were not enough")


def rounded_to(adapter, bits):
    """The adapter with each row of A and column of B rounded to integers of so many bits."""
    modules = {}
    for name, factors in adapter.modules.items():
        down, up = rounded_rows(factors.down, bits), rounded_rows(factors.up.mT, bits).mT
        modules[name] = replace(factors, down=down, up=up)
    return replace(adapter, modules=modules)


def rounded_rows(rows, bits):
    rows = rows.double()
    scale = rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (rows / scale).round() * scale
