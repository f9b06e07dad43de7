"""Names of tensors and adapters."""

import pytest

from eigenlorax.core import keys
from eigenlorax.core.keys import Kind
from eigenlorax.errors import AdapterNameError, FormatError

LAYER = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("raw", "kind", "module", "key"),
    [
        (f"base_model.model.{LAYER}.lora_A.weight", Kind.DOWN, LAYER, f"{LAYER}.lora_A.weight"),
        (f"base_model.model.{LAYER}.lora_B.default.weight", Kind.UP, LAYER, f"{LAYER}.lora_B.weight"),
        (f"{LAYER}.lora_B.my_task.weight", Kind.UP, LAYER, f"{LAYER}.lora_B.weight"),
        (f"{LAYER}.lora_B.bias", Kind.CARRIED, LAYER, f"{LAYER}.lora_B.bias"),
        (f"{LAYER}.lora_B.default.bias", Kind.CARRIED, LAYER, f"{LAYER}.lora_B.bias"),
        (f"{LAYER}.lora_magnitude_vector", Kind.CARRIED, LAYER, f"{LAYER}.lora_magnitude_vector"),
        (f"{LAYER}.lora_magnitude_vector.default", Kind.CARRIED, LAYER, f"{LAYER}.lora_magnitude_vector"),
        (f"{LAYER}.lora_magnitude_vector.weight", Kind.CARRIED, LAYER, f"{LAYER}.lora_magnitude_vector.weight"),
        ("e.lora_embedding_A.default", Kind.CARRIED, "e", "e.lora_embedding_A"),
        ("e.lora_embedding_B", Kind.CARRIED, "e", "e.lora_embedding_B"),
        ("base_model.model.classifier.weight", Kind.HEAD, "classifier", "classifier.weight"),
        ("base_model.model.classifier.modules_to_save.default.bias", Kind.HEAD, "classifier", "classifier.bias"),
        ("base_model.model.classifier.modules_to_save.bias", Kind.HEAD, "classifier", "classifier.bias"),
        ("c.modules_to_save.default.dense.weight", Kind.HEAD, "c", "c.dense.weight"),
        (f"{LAYER}.bias", Kind.HEAD, LAYER, f"{LAYER}.bias"),
        ("base_model.model.lm_head.base_layer.weight", Kind.HEAD, "lm_head.base_layer", "lm_head.base_layer.weight"),
    ],
)
def test_every_tensor_of_a_lora_file_has_its_place(raw, kind, module, key):
    assert keys.parse_peft_key(raw) == keys.TensorName(kind, module, f"base_model.model.{key}")


@pytest.mark.parametrize(
    "raw",
    [
        f"{LAYER}.lora_C.weight",
        f"{LAYER}.lora_A",
        f"{LAYER}.lora_A.default.extra.weight",
        f"{LAYER}.lora_E",
        "lora_unet_down_blocks_0.lora_down.weight",
        "lora_te_text_model.alpha",
        "unet.to_k_lora.down.weight",
        f"{LAYER}.hada_w1_a",
        f"{LAYER}.ia3_l",
        f"{LAYER}.vera_lambda_b",
        f"{LAYER}.dora_scale",
    ],
)
def test_what_is_not_understood_is_an_error_that_names_it(raw):
    with pytest.raises(FormatError, match=f"tensor '{raw}' is not part of a PEFT LoRA"):
        keys.parse_peft_key(raw)


def test_a_head_may_have_any_name():
    assert keys.parse_peft_key("head.mix.alpha", ["mix"]).kind is Kind.HEAD


@pytest.mark.parametrize("name", ["a", "A1._-", "x" * 96, "org--name", "0"])
def test_names_that_are_folders(name):
    assert keys.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a\\b", "a b", "a\n", "x" * 97, "é", "a.", "a@b"])
def test_names_that_are_not(name):
    with pytest.raises(AdapterNameError, match="is not allowed"):
        keys.check_name(name)
