"""Real adapters by strangers go through fit, inspect and export. They are no part of the repository."""

import pytest
import torch
from safetensors.torch import load_file

import eigenlorax as ex
import reference

pytestmark = pytest.mark.slow

FAMILIES = {
    "gpt2": {},
    "bert-base-uncased": {},
    "distilbert-base-uncased": {"allow_pickle": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_in_float32_they_come_back(shared, tmp_path, family):
    folder, options = shared / "zoo" / family, FAMILIES[family]
    ex.fit([folder], energy=1.0, dtype="float32", **options).save(tmp_path / "pack")
    written = ex.Pack.open(tmp_path / "pack").export(tmp_path / "out")
    assert len(written) == len([f for f in folder.iterdir() if (f / "adapter_config.json").is_file()])
    for name, path in written.items():
        original, back = ex.read_adapter(folder / name, **options), ex.read_adapter(path)
        assert reference.delta_error(original, back) < 1e-5
        for key, head in original.heads.items():
            assert torch.equal(head, back.heads[key])


@pytest.mark.parametrize("k", [4, 16])
def test_reported_errors_are_those_of_dense_matrices(shared, k):
    folder = shared / "zoo" / "gpt2"
    pack = ex.fit([folder], n_components=k)
    for name, record in pack.records.items():
        wanted = reference.delta_error(ex.read_adapter(folder / name), pack.adapter(name))
        assert record.delta_error == pytest.approx(wanted, rel=1e-4)


def test_the_delta_weighting_loses_less_than_the_factors(shared):
    folder = shared / "zoo" / "gpt2"
    delta, factors = (ex.fit([folder], n_components=16, weighting=w).summary.in_fit for w in ("delta", "factors"))
    assert delta.mean < factors.mean
    assert delta.rms < factors.rms


def test_a_folder_of_several_base_models_says_where_to_look(shared):
    with pytest.raises(ValueError, match="one level deeper: try .*zoo"):
        ex.fit([shared / "zoo"])


def test_a_lora_of_stable_diffusion_comes_back(shared, tmp_path):
    folder = shared / "zoo" / "stable-diffusion-v1" / "catundchat__stable-diffusion-v1.5-lora"
    ex.fit([folder], energy=1.0, dtype="float32").save(tmp_path / "pack")
    pack, original = ex.Pack.open(tmp_path / "pack"), ex.read_adapter(folder)
    for place, chosen in (("as-it-came", None), ("kohya", "kohya"), ("peft", "peft")):
        (path,) = pack.export(tmp_path / place, format=chosen).values()
        back = ex.read_adapter(path)
        if chosen == "peft":
            # without the component, as the model itself has them
            back = ex.from_factors("back", {f"unet.{name}": one for name, one in back.modules.items()})
        assert reference.delta_error(original, back) < 1e-5
        if chosen is not None:
            continue
        before, after = load_file(folder / "pytorch_lora_weights.safetensors"), load_file(path)
        assert {f"unet.{key}": t.shape for key, t in before.items()} == {k: t.shape for k, t in after.items()}
