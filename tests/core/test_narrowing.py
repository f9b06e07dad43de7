"""Factors in a narrower dtype: exact in another gauge, refused where nothing is left, and warned of where little is."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.core import narrowing
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import NonFiniteError, RoundingWarning
from eigenlorax.formats import read_adapter, write_adapter
from eigenlorax.formats.image import tensor_keys
from outcomes import contents

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def factors(*, down=1.0, up=1.0, scaling=0.5, dtype=torch.float64):
    """Random ones of rank 3; down, up: the sizes of their rows and columns, one or three."""
    generator = torch.Generator().manual_seed(1)
    sizes = [torch.as_tensor(size, dtype=torch.float64).expand(3) for size in (down, up)]
    rows, columns = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 29), (17, 3)))
    return LoRAFactors((rows * sizes[0][:, None]).to(dtype), (columns * sizes[1]).to(dtype), scaling)


def delta(found):
    return found.scaling * found.up.double() @ found.down.double()


def error(exact, found):
    return float((delta(exact) - delta(found)).norm() / delta(exact).norm())


def adapter(found, module="encoder.query"):
    return from_factors("quiet", {module: found}, base_model="org/base")


@pytest.mark.parametrize(
    "sizes",
    [
        {"up": 1e-7},
        {"down": 1e-7},
        {"down": 1e-9, "up": 1e4},
        {"up": 1e6},
        # a whole factor's norm would not show it
        {"down": [1e5, 1e-7, 1.0], "up": [1e-5, 1e7, 1.0]},
        {"down": [1e-9, 1.0, 1.0], "up": [1e9, 1.0, 1.0]},
    ],
)
def test_factors_of_uneven_sizes_keep_their_digits_in_float16(sizes):
    exact = factors(**sizes)
    moved = narrowing.balance(exact, torch.float16)
    assert torch.equal(delta(moved), delta(exact))
    kept = narrowing.narrow(exact, torch.float16)
    assert (kept.down.dtype, kept.up.dtype, kept.scaling) == (torch.float16, torch.float16, exact.scaling)
    assert error(exact, kept) < 5e-4


@pytest.mark.parametrize("sizes", [{}, {"up": 1e-3}, {"up": 3e-5}, {"up": [1.0, 1e-9, 1.0]}, {"up": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_others_stay_as_they_are(sizes, dtype):
    exact = factors(**sizes)
    assert narrowing.balance(exact, dtype) is exact
    kept = narrowing.narrow(exact, dtype)
    assert torch.equal(kept.down, exact.down.to(dtype))
    assert torch.equal(kept.up, exact.up.to(dtype))


@pytest.mark.parametrize("format", ["peft", *tensor_keys.DIALECTS])
class TestOneAdapter:
    def test_that_float16_holds_in_another_gauge(self, format, tmp_path):
        exact = adapter(factors(up=1e-7), TO_K)
        path = write_adapter(exact, tmp_path / "a", format=format, dtype=torch.float16)
        (found,) = read_adapter(path).modules.values()
        assert found.down.dtype == torch.float16
        assert error(exact.modules[TO_K], found) < 5e-4

    def test_of_which_nothing_would_be_left(self, format, tmp_path):
        exact = adapter(factors(up=1e-17), TO_K)
        with pytest.raises(
            NonFiniteError, match=r"'quiet', module \S+: its update of norm .* vanishes in float16.*bfloa"
        ):
            write_adapter(exact, tmp_path / "a", format=format, dtype=torch.float16)
        assert list(tmp_path.iterdir()) == []
        write_adapter(exact, tmp_path / "a", format=format, dtype=torch.bfloat16)

    def test_of_which_few_digits_are_left(self, format, tmp_path):
        exact = adapter(factors(up=1e-12), TO_K)
        with pytest.warns(
            RoundingWarning, match=r"'quiet': rounding to float16 changes its update by 0.0\d+ of its norm"
        ):
            path = write_adapter(exact, tmp_path / "a", format=format, dtype=torch.float16)
        assert 0.01 < error(exact.modules[TO_K], next(iter(read_adapter(path).modules.values()))) < 0.1


@pytest.mark.parametrize(("scaling", "fits"), [(1e-7, True), (1e-30, False)])
def test_a_scaling_that_is_multiplied_into_a_factor(scaling, fits, tmp_path):
    exact = adapter(factors(scaling=scaling, dtype=torch.float16), TO_K)
    if fits:
        path = write_adapter(exact, tmp_path / "a", format=tensor_keys.OLD)
        assert error(exact.modules[TO_K], read_adapter(path).modules[TO_K]) < 1e-3
    else:
        with pytest.raises(NonFiniteError, match="vanishes in float16"):
            write_adapter(exact, tmp_path / "a", format=tensor_keys.OLD)


class TestAPack:
    @pytest.fixture
    def fitted(self, tmp_path):
        """A pack of an ordinary adapter and of one with second factors of some size."""

        def fit(size):
            ordinary = read_adapter(make_adapter(tmp_path / "in" / "a", seed=1))
            small = {
                name: LoRAFactors(one.down, one.up * size, one.scaling)
                for name, one in read_adapter(make_adapter(tmp_path / "in" / "b", seed=2)).modules.items()
            }
            return ex.fit([ordinary, from_factors("b", small, base_model="org/base")], energy=1.0)

        return fit

    def test_its_float16_is_that_of_another_gauge_where_needed(self, fitted, tmp_path):
        pack = fitted(1e-7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            written = pack.export(tmp_path / "out", dtype="float16")
        for name, path in written.items():
            exact, found = pack.adapter(name, torch.float64), read_adapter(path)
            worst = max(error(exact.modules[module], found.modules[module]) for module in exact.specs)
            assert 1e-5 < worst < 5e-4
            assert 1e-5 < pack.export_rounding(name, "float16") < 5e-4
        # one that float16 holds as it is has the numbers that rounding gives
        tensors = load_file(written["a"] / "adapter_model.safetensors")
        for module, one in pack.adapter("a", torch.float64).modules.items():
            assert torch.equal(tensors[f"base_model.model.{module}.lora_B.weight"], one.up.half())

    def test_nothing_is_written_where_one_of_its_adapters_would_vanish(self, fitted, tmp_path):
        pack = fitted(1e-17)
        before = contents(tmp_path)
        with pytest.raises(NonFiniteError, match=r"adapter 'b', module \S+: its update .* vanishes in float16"):
            pack.export(tmp_path / "out", dtype="float16")
        assert contents(tmp_path) == before
        assert pack.export(tmp_path / "out").keys() == {"a", "b"}

    def test_a_loss_of_digits_is_warned_of(self, fitted, tmp_path):
        with pytest.warns(
            RoundingWarning, match="adapter 'b': rounding to float16 .* Use bfloat16 or float32."
        ) as noted:
            fitted(1e-12).export(tmp_path / "out", dtype="float16")
        assert len(noted) == 1
