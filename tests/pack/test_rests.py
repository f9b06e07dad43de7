"""What the bases do not hold, kept beside the coefficients: in a pack's files, in figures, and as an ordinary LoRA."""

from dataclasses import replace

import pytest
import torch

import eigenlorax as ex
from eigenlorax.core import keys, metrics, projection
from eigenlorax.core.batch import pad_factors
from eigenlorax.errors import NonFiniteError, PackDamagedError
from eigenlorax.reports.analysis import losses
from planted import TOLERANCE, random_adapter
from rests import SIDES, with_adapters, with_rest, with_rests

QUERY = "encoder.0.query"


@pytest.fixture(scope="module")
def plain():
    return ex.fit([random_adapter(f"a{i}", 100 * i) for i in range(4)], n_components=6)


@pytest.fixture(scope="module")
def pack(plain):
    return with_rests(plain, SIDES)


def oracle(pack, name, module):
    """The update in float64, from its definition."""
    packed = pack.packed(name)
    one, bases = packed.coefficients[module], pack.subspace.modules[packed.subspace_names[module]]
    down = one.down.double() @ bases.down.components.double()
    up = bases.up.components.double().mT @ one.up.double()
    if one.down_residual is not None:
        down = down + one.down_residual.double()
    if one.up_residual is not None:
        up = up + one.up_residual.double()
    return one.scaling * up @ down


class TestFiles:
    def test_what_was_saved_comes_back_to_the_bit(self, pack, tmp_path):
        path = pack.save(tmp_path / "pack")
        opened = ex.Pack.open(path)
        for name in pack.names:
            got, wanted = opened.packed(name), pack.packed(name)
            assert got.record == wanted.record
            for module, one in wanted.coefficients.items():
                for side in keys.SIDES:
                    mine, theirs = got.coefficients[module].residual(side), one.residual(side)
                    assert (mine is None) == (theirs is None)
                    assert mine is None or torch.equal(mine, theirs)
        opened.save(tmp_path / "again")
        for file in path.rglob("*.safetensors"):
            assert (tmp_path / "again" / file.relative_to(path)).read_bytes() == file.read_bytes()

    def test_the_config_says_which_sides_have_one(self, pack, plain, tmp_path):
        path = pack.save(tmp_path / "pack")
        configs = {name: ex.EigenLoraxConfig.from_pretrained(str(path / "adapters" / name)) for name in pack.names}
        modules = sorted(pack.info.modules)
        assert configs["a0"].rests == {module: ["down", "up"] for module in modules}
        assert configs["a1"].rests == {modules[0]: ["down"]}
        assert configs["a2"].rests == {modules[0]: ["up"], modules[1]: ["down", "up"]}
        assert configs["a3"].rests == {}
        assert keys.RESIDUAL_SIDES not in (path / "adapters" / "a3" / keys.ADAPTER_CONFIG).read_text()

    def test_an_export_is_the_whole_update(self, pack, tmp_path):
        for name in pack.names:
            folder = pack.export(tmp_path, name)[name]
            found = ex.read_adapter(folder)
            for module, factors in found.modules.items():
                wanted = oracle(pack, name, module)
                got = factors.scaling * factors.up.double() @ factors.down.double()
                assert torch.linalg.norm(got - wanted) < TOLERANCE[torch.float32] * torch.linalg.norm(wanted)

    def test_one_that_does_not_fit_the_module_is_damage(self, pack, tmp_path):
        wide = pack.packed("a0")
        one = wide.coefficients[QUERY]
        bad = replace(one, down_residual=torch.nn.functional.pad(one.down_residual, (0, 1)))
        broken = with_adapters(pack, {"a0": replace(wide, coefficients={**wide.coefficients, QUERY: bad})})
        path = broken.save(tmp_path / "pack")
        with pytest.raises(PackDamagedError, match=f"residual of module {QUERY} is"):
            ex.Pack.open(path).packed("a0")

    def test_it_is_counted(self, pack, plain):
        for name in SIDES:
            more = sum(
                rest.nbytes
                for one in pack.packed(name).coefficients.values()
                for rest in (one.down_residual, one.up_residual)
                if rest is not None
            )
            assert more > 0
            assert pack.records[name].coefficient_bytes == plain.records[name].coefficient_bytes + more

    def test_it_stays_where_the_subspace_grows(self, pack):
        grown = with_rests(ex.fit([random_adapter(f"a{i}", 100 * i) for i in range(4)], n_components=6), SIDES)
        grown.augment(2, 5)
        for name in pack.names:
            for module, factors in grown.adapter(name).modules.items():
                wanted = pack.adapter(name).modules[module]
                assert torch.equal(factors.down, wanted.down)
                assert torch.equal(factors.up, wanted.up)


class TestErrors:
    @pytest.mark.parametrize("sides", ["down", "up", "both"])
    @pytest.mark.parametrize("rank", [2, 3, 5])
    def test_are_those_of_dense_updates(self, pack, sides, rank):
        factors = random_adapter("x", 40).modules[QUERY]
        bases = pack.subspace.modules[QUERY]
        other = random_adapter("y", 80, rank=rank).modules[QUERY]
        found = with_rest(projection.project(other, bases, torch.float32), bases, sides, seed=9)
        plain = projection.reconstruct(found, bases)
        dense = factors.scaling * factors.up.double() @ factors.down.double()
        off = torch.linalg.norm(dense - plain.scaling * plain.up @ plain.down).square()
        got = metrics.module_error(factors, found, bases)
        assert got.square == pytest.approx(float(torch.linalg.norm(dense).square()), rel=1e-12)
        assert got.squared_error == got.squared_rounding == pytest.approx(float(off), rel=1e-12)

    def test_a_rest_that_is_all_that_was_missing_leaves_none(self, pack):
        factors = random_adapter("x", 40).modules[QUERY]
        bases = pack.subspace.modules[QUERY]
        inside = projection.project(factors, bases)
        plain = projection.reconstruct(inside, bases)
        whole = replace(
            inside, down_residual=factors.down.double() - plain.down, up_residual=factors.up.double() - plain.up
        )
        found = metrics.module_error(factors, whole, bases)
        assert found.squared_error < 1e-28 * found.square

    @pytest.mark.parametrize("rank", [1, 2, 5, 7])
    def test_of_coefficients_of_another_rank(self, pack, rank):
        factors = random_adapter("x", 40).modules[QUERY]
        bases = pack.subspace.modules[QUERY]
        other = projection.project(random_adapter("y", 80, rank=rank).modules[QUERY], bases, torch.float32)
        plain = projection.reconstruct(other, bases)
        dense = factors.scaling * factors.up.double() @ factors.down.double()
        off = torch.linalg.norm(dense - plain.scaling * plain.up @ plain.down).square()
        best = projection.reconstruct(projection.project(factors, bases), bases)
        rounding = torch.linalg.norm(
            best.scaling * best.up @ best.down - plain.scaling * plain.up @ plain.down
        ).square()
        got = metrics.module_error(factors, other, bases)
        assert got.squared_error == pytest.approx(float(off), rel=1e-10)
        assert got.squared_rounding == pytest.approx(float(rounding), rel=1e-10)

    def test_in_reports_too(self, pack):
        originals = [random_adapter(f"a{i}", 100 * i).modules[QUERY] for i in range(4)]
        bases = pack.subspace.modules[QUERY]
        coefficients = [pack.packed(f"a{i}").coefficients[QUERY] for i in range(4)]
        found = losses.stored(pad_factors(originals, bases.shape[1], bases.shape[0]), originals, coefficients, bases)
        for index, (factors, one) in enumerate(zip(originals, coefficients, strict=True)):
            wanted = metrics.module_error(factors, one, bases).squared_error
            assert float(found.delta[index]) == pytest.approx(wanted, rel=1e-9)


class TestAddingWithAResidual:
    """Adapters whose factors are made orthogonal to the bases of a pack, times a scale."""

    @staticmethod
    def outside(pack, scale):
        adapter = random_adapter("new", 900)
        modules = {}
        for name, factors in adapter.modules.items():
            bases = pack.subspace.modules[name]
            down, up = (
                scale * (rows.double() - rows.double() @ torch.linalg.pinv(basis.double()) @ basis.double())
                for rows, basis in ((factors.down, bases.down.components), (factors.up.mT, bases.up.components))
            )
            modules[name] = replace(factors, down=down.float(), up=up.mT.float().contiguous())
        return replace(adapter, modules=modules)

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)])
    def test_loses_only_rounding(self, dtype, tolerance):
        pack = ex.fit([random_adapter(f"a{i}", 100 * i) for i in range(4)], n_components=6, dtype=dtype)
        adapter = self.outside(pack, 1.0)
        record = pack.add(adapter, residual=True)
        assert record.delta_error < tolerance
        for name, factors in adapter.modules.items():
            wanted = factors.scaling * factors.up.double() @ factors.down.double()
            error = (oracle(pack, "new", name) - wanted).norm() / wanted.norm()
            assert float(error) < tolerance

    def test_numbers_beyond_the_dtype_are_refused(self):
        pack = ex.fit([random_adapter(f"a{i}", 100 * i) for i in range(4)], n_components=6, dtype="float16")
        with pytest.raises(NonFiniteError, match=r"has factors that float16 cannot represent\. Fit a pack with"):
            pack.add(self.outside(pack, 1e5), residual=True)
        assert "new" not in pack.names
