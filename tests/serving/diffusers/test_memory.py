"""What styles take in a pipeline, to the byte: one basis, coefficients, one core a layer, and nothing expanded."""

import sys
from pathlib import Path

import pytest
import torch

import eigenlorax as ex
from eigenlorax.tuner.layer import EigenLoraxLayer
from tinypipes import picture, style

# at the end: nothing there may hide a module of another name
sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
import styles

pytestmark = pytest.mark.slow

RANK, K, STYLES = 3, 5, 14
DOCS = Path(__file__).resolve().parents[3] / "docs" / "diffusion.md"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    from tinypipes import make_sd

    pipe = make_sd(tmp_path_factory.mktemp("sd"))
    return ex.fit(
        [style(pipe, f"s{n}", n, rank=RANK, parts=["unet"], convolutions=True) for n in range(STYLES)],
        n_components=K,
        sweeps=0,
        warn_above=1.0,
    )


def added(model, before):
    """Bytes of all tensors that a model has now and had not before, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(size for place, size in storages.items() if place not in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_of_many_styles(make, many, dtype):
    pipe = make("sd")
    pipe.unet.to(dtype)
    before = {one.untyped_storage().data_ptr() for one in pipe.unet.parameters()}
    ex.load_into(pipe, many)
    pipe.unet.set_adapters([f"s{n}" for n in range(STYLES)], [0.1] * STYLES)
    layers = [one for one in pipe.unet.modules() if isinstance(one, EigenLoraxLayer)]
    shapes = [tuple(layer.get_base_layer().weight.flatten(1).shape) for layer in layers]
    assert len(shapes) == 65
    itemsize = dtype.itemsize
    wanted = styles.held(shapes, STYLES, RANK, K, itemsize)
    # the pack's coefficients are in float32, and are not rounded
    coefficients = wanted.coefficients // itemsize * 4
    assert added(pipe.unet, before) == wanted.bases + coefficients + wanted.cores
    # running it leaves nothing behind
    if dtype == torch.float32:
        picture(pipe)
        assert added(pipe.unet, before) == wanted.bases + coefficients + wanted.cores


def test_the_basis_may_stay_in_float32(make, many):
    pipe = make("sd")
    pipe.unet.to(torch.float16)
    ex.load_into(pipe, many, ["s1", "s2"], dtype=torch.float32)
    dtypes = {basis.dtype for name, basis in pipe.unet.named_buffers() if "eigenlorax_basis" in name}
    assert dtypes == {torch.float32}


def test_the_table_of_the_docs():
    text = DOCS.read_text("utf-8")
    assert styles.bytes_table() in text.partition("<!-- styles:begin -->")[2].partition("<!-- styles:end -->")[0]
