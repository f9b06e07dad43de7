"""The report, the curve and the pack of a planted collection, without a page."""

import re
import shutil
import zipfile
from xml.etree import ElementTree

import pytest

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.app import analysis, picture
from eigenlorax.app.analysis import Collection, CurvePoint
from eigenlorax.errors import BaseModelError

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")
SHAPES = ((170, 110), (130, 230))
NAMES = ("alpha", "beta", "gamma", "delta")


def ignore(stage, done, total):
    pass


@pytest.fixture(scope="module")
def done(adapters):
    return analysis.analyse(Collection([adapters], {}, {}), ignore)


def test_the_report_is_that_of_the_default_pack(adapters, done):
    pack = ex.fit(adapters)
    assert done.report.collection.fingerprint == pack.info.fingerprint
    assert {each.name: each.delta_error for each in done.report.adapters} == {
        name: record.delta_error for name, record in pack.records.items()
    }
    assert done.report.left_out.errors.mean > 0.9
    assert done.notes == pack.notes


def test_a_larger_error_is_a_smaller_pack(done):
    errors = [point.max_error for point in done.points]
    assert errors == [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]
    ratios = [point.ratio for point in done.points]
    assert ratios == sorted(ratios)
    # the LoRAs in 16 bits
    lora_bytes = 2 * 4 * 3 * sum(map(sum, SHAPES))
    assert all(point.ratio * point.stored_bytes == pytest.approx(lora_bytes) for point in done.points)
    assert str(done.points[2]).startswith("error at most 0.1: about ")


def test_estimates_of_the_curve_are_near_the_pack(adapters, done):
    for point in done.points[1:6:2]:
        summary = ex.fit(adapters, max_error=point.max_error).summary
        assert point.stored_bytes == pytest.approx(summary.bytes.pack, rel=0.25)


@pytest.mark.parametrize("max_error", [0.05, 0.3])
def test_the_written_pack_keeps_the_error(adapters, done, tmp_path, max_error):
    stages = []
    written = analysis.write_pack(
        done.collection, max_error, tmp_path, lambda stage, steps, total: stages.append((stage, steps <= total))
    )
    assert written.path == tmp_path / f"pack-{max_error}.zip"
    assert [path.name for path in tmp_path.iterdir()] == [written.path.name]
    shutil.unpack_archive(written.path, tmp_path / "out")
    pack = ex.Pack.open(tmp_path / "out/pack")
    pack.verify()
    assert sorted(pack.names) == sorted(NAMES)
    verified = ex.verify(pack, adapters)
    assert verified.holds
    assert max(check.delta_error for check in verified.adapters.values()) <= max_error
    assert all(in_range for _, in_range in stages)
    assert ("writing the zip file", True) in stages
    assert re.search(
        rf"pack of 4 adapters takes .* is {max(r.delta_error for r in pack.records.values()):.3f}", written.text
    )


def test_a_pack_replaces_the_one_before(done, tmp_path):
    first = analysis.write_pack(done.collection, 0.3, tmp_path, ignore)
    before = first.path.read_bytes()
    again = analysis.write_pack(done.collection, 0.3, tmp_path, ignore)
    with zipfile.ZipFile(again.path) as archive:
        assert archive.testzip() is None
    assert len(again.path.read_bytes()) == len(before)


def test_notes_name_what_is_equal(adapters, tmp_path):
    shutil.copytree(adapters, tmp_path / "in")
    shutil.copytree(tmp_path / "in/alpha", tmp_path / "in/copy")
    found = analysis.analyse(Collection([tmp_path / "in"], {}, {}), ignore)
    assert any("alpha" in note and "copy" in note for note in found.notes)


def test_base_models_that_differ(tmp_path):
    make_adapter(tmp_path / "a", seed=1, base="org/base")
    make_adapter(tmp_path / "b", seed=2, base="org/base-copy")
    with pytest.raises(BaseModelError, match="org/base-copy"):
        analysis.analyse(Collection([tmp_path], {}, {}), ignore)
    accepted = analysis.analyse(Collection([tmp_path], {"same_base": True}, {}), ignore)
    assert accepted.report.collection.adapters == 2


class TestPicture:
    POINTS = (CurvePoint(0.05, 400, 4.0), CurvePoint(0.1, 200, 8.0), CurvePoint(0.4, 100, 16.0))

    def groups(self, chosen):
        root = ElementTree.fromstring(picture.draw(self.POINTS, chosen))
        return [group for group in root.iter("g") if "data-point" in group.attrib]

    def test_points_have_their_numbers_and_one_is_chosen(self):
        groups = self.groups(0.1)
        assert [group.attrib["data-point"] for group in groups] == ["0", "1", "2"]
        assert [group.attrib.get("class") for group in groups] == [None, "chosen", None]
        assert [[text.text for text in group.iter("text")] for group in groups] == [
            ["4.00×", "0.05"],
            ["8.00×", "0.1"],
            ["16.0×", "0.4"],
        ]

    def test_axes_are_logarithmic_and_points_inside(self):
        circles = [next(group.iter("circle")).attrib for group in self.groups(0.4)]
        x, y = ([float(circle[key]) for circle in circles] for key in ("cx", "cy"))
        assert y[0] - y[1] == pytest.approx(y[1] - y[2])
        assert 2 * (x[1] - x[0]) == pytest.approx(x[2] - x[1])
        assert min(x) > 0
        assert max(x) < picture.WIDTH
        assert min(y) > 0
        assert max(y) < picture.HEIGHT
