"""`test_custom_models.py` of PEFT: layers, merging, saving, several adapters, dtypes, on models of a few layers."""

from peft_tests import test_custom_models as peft

from eigenlorax import EigenLoraxConfig

from . import packs, subject

CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv2d2", "Conv2d1x1", "Conv3d")
for model_id in ("MLP", "EmbConv1D", *CONVOLUTIONS):
    packs.pack_of(model_id, peft.MockTransformerWrapper.from_pretrained(model_id))
MLP = packs.folder_of("MLP")
# lin1 has two outputs: with all directions in the basis there is no room for an extra one
NARROW = packs.pack_of("MLP-narrow", peft.MLP(), n_components=1)
NARROW_CONVOLUTION = packs.pack_of(
    "Conv2d-narrow", peft.MockTransformerWrapper.from_pretrained("Conv2d"), n_components=1
)
DEEP = packs.pack_of("DeepMLP", peft.DeepMLP(size=256))

BOTH = ["lin0", "lin1"]
CASES = {
    "MLP": {
        "two modules": {"target_modules": BOTH},
        "core": {"target_modules": BOTH, "core": True},
        "a name": {"target_modules": "lin0"},
        "first": {"target_modules": ["lin0"]},
        "second": {"target_modules": ["lin1"]},
        "modules of the subspace": {},
        "exclude": {"exclude_modules": ["lin1"]},
        "modules_to_save": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        "core modules_to_save": {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "core": True},
        "regex": {"target_modules": r".*0$"},
        "patterns": {"target_modules": BOTH, "r": 4, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 16}},
        "rslora": {"target_modules": BOTH, "lora_alpha": 16, "use_rslora": True},
        "dropout": {"target_modules": BOTH, "lora_dropout": 0.1},
        "embedded": {"target_modules": BOTH, "embed_subspace": True},
        "embedded core": {"target_modules": BOTH, "embed_subspace": True, "core": True},
        "extra": {"subspace": NARROW, "n_extra": 1},
        "extra embedded core": {"subspace": NARROW, "n_extra": 1, "embed_subspace": True, "core": True},
    },
    "EmbConv1D": {
        "Conv1D": {"target_modules": ["conv1d"]},
        "Conv1D core": {"target_modules": ["conv1d", "lin0"], "core": True},
    },
    "Conv2d": {
        "convolution": {"target_modules": ["conv2d"]},
        "convolution and linear": {"target_modules": ["conv2d", "lin0"]},
        "modules of the subspace, core": {"core": True},
        "dropout": {"lora_dropout": 0.1},
        "embedded": {"embed_subspace": True},
        "extra": {"subspace": NARROW_CONVOLUTION, "r": 1, "n_extra": 1},
        "modules_to_save": {"target_modules": ["conv2d"], "modules_to_save": ["lin0"]},
        "patterns": {"r": 4, "rank_pattern": {"lin0": 2}, "alpha_pattern": {"conv2d": 16}},
    },
    "Conv2d2": {
        "convolution": {"target_modules": ["conv2d"]},
        "convolution and linear": {"target_modules": ["lin0", "conv2d"]},
        "core": {"target_modules": ["lin0", "conv2d"], "core": True},
    },
    "Conv2d1x1": {"a kernel of 1": {"target_modules": ["conv2d"], "r": 1}},
    "Conv1d": {"one row": {"target_modules": ["conv1d"], "r": 1}, "core": {"core": True, "r": 1}},
    "Conv3d": {
        "convolution": {"target_modules": ["conv3d"], "lora_alpha": 2},
        "convolution and linear, core": {"target_modules": ["conv3d", "lin0"], "core": True},
    },
}
RANKED = {"r": 2, "init_weights": False, "subspace": MLP}


def config(**kwargs) -> EigenLoraxConfig:
    return EigenLoraxConfig(**{**RANKED, **kwargs})


subject.rows(
    peft.TEST_CASES,
    [
        (f"{model_id} EigenLoRAx {name}", model_id, EigenLoraxConfig, {"r": 2, **kwargs})
        for model_id, cases in CASES.items()
        for name, kwargs in list(cases.items())[: 2 if subject.quick else None]
    ],
)
subject.rows(peft.ALL_PEFT_CONFIG_CLASSES, [subject.with_subspace("EigenLoraxOnDeepMLP", DEEP)])
subject.rows(
    peft.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES,
    [
        (f"EigenLoRAx {name}", "eigenlorax", EigenLoraxConfig, {**RANKED, **first}, {**RANKED, **second})
        for name, first, second in (
            ("same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
            ("different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
            ("a core beside factors", {"target_modules": ["lin0"]}, {"target_modules": BOTH, "core": True}),
            ("two subspaces", {"target_modules": BOTH}, {"target_modules": BOTH, "subspace": NARROW, "r": 1}),
            ("embedded beside shared", {"target_modules": BOTH}, {"target_modules": BOTH, "embed_subspace": True}),
        )
    ],
)

mixed = peft.TestMixedAdapterBatches
subject.rows(
    peft.MIXED_ADAPTER_TEST_CASES,
    [
        ("EigenLoRAx mixed", config(target_modules=["lin0"]), config(target_modules=["lin0"], r=8)),
        ("EigenLoRAx mixed, core", config(target_modules=BOTH), config(target_modules=BOTH, core=True)),
        ("EigenLoRAx mixed, two subspaces", config(target_modules=BOTH), config(subspace=NARROW, r=1, n_extra=1)),
    ],
)
subject.rows(
    subject.written(mixed.test_mixed_adapter_batches_different_target_layers),
    [("EigenLoRAx mixed", config(target_modules=["lin0"]), config(target_modules=["lin1"]))],
)
subject.rows(
    subject.written(mixed.test_mixed_adapter_batches_multiple_modules_to_save),
    [("EigenLoRAx mixed", *[config(target_modules=["lin0"], modules_to_save=["lin1"]) for _ in range(2)])],
)
subject.rows(
    subject.written(mixed.test_mixed_adapter_batches_partly_overlapping_target_layers),
    [("EigenLoRAx mixed", config(target_modules=["lin0"]), config(target_modules=BOTH))],
)
subject.rows(
    subject.written(mixed.test_mixed_adapter_batches_lora_conv1d_emb),
    [
        (
            "EigenLoRAx mixed, Conv1D",
            config(subspace=packs.folder_of("EmbConv1D"), target_modules=["conv1d"]),
            config(subspace=packs.folder_of("EmbConv1D"), target_modules=["conv1d", "lin0"]),
        )
    ],
)
subject.rows(
    subject.written(mixed.test_mixed_adapter_batches_lora_wrong_adapter_name_raises),
    [("EigenLoRAx mixed", config(target_modules=["lin0"]))],
)

custom = peft.TestPeftCustomModel
for function in (
    custom.test_multiple_adapters_mixed_modules_to_save,
    custom.test_multiple_adapters_mixed_modules_to_save_order_switched,
):
    subject.rows(subject.written(function), [subject.with_subspace("EigenLoraxOnMLP", MLP)])
subject.rows(
    subject.written(custom.test_adapter_name_makes_no_difference),
    [config(target_modules=["lin0"]), config(target_modules=BOTH, core=True)],
)


class TestPeftCustomModel(custom):
    """As it is."""


class TestMultipleActiveAdapters(peft.TestMultipleActiveAdapters):
    """As it is."""


class TestMixedAdapterBatches(mixed):
    """As it is."""


class TestRequiresGrad(peft.TestRequiresGrad):
    """As it is."""


class TestPeftFsdpStateDict(peft.TestPeftFsdpStateDict):
    """As it is."""
