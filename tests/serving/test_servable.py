"""Which adapters vLLM can serve: each reason against it, and the rank that vLLM will see."""

import json
from dataclasses import replace

import pytest
import torch

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from eigenlorax.errors import ServingError
from eigenlorax.serving.vllm.cores import lora_on_cores
from eigenlorax.serving.vllm.plan import RANKS
from eigenlorax.serving.vllm.servable import expanded_rank, refusal, shared_rank
from rests import with_rests

HEAD = "base_model.model.score.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An adapter of rank 3 in a subspace of at most 4 components."""
    place = tmp_path_factory.mktemp("plain")
    make_adapters(place / "in", "alpha beta")
    return ex.fit(place / "in", n_components=4).packed("alpha")


def with_config(found, **fields):
    config = {**json.loads(found.source_config), **fields}
    return replace(found, source_config=json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "EVA"},
        {"init_lora_weights": False},
        {"modules_to_save": ["classifier", "score"]},
        {"layer_replication": None, "trainable_token_indices": None, "use_dora": False},
    ],
)
def test_a_plain_lora_can_be_served(plain, fields, shared):
    assert refusal(with_config(plain, **fields), shared=shared) is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"modules_to_save": ["score", "lm_head"]}, "lm_head"),
        ({"lora_alpha": ...}, "has no lora_alpha"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_its_name(plain, fields, said, shared):
    why = refusal(with_config(plain, **fields), shared=shared)
    assert why.startswith("adapter 'alpha' cannot be served: ")
    assert said in why
    assert why.endswith(".")


@pytest.mark.parametrize("key", [HEAD, "base_model.model.score.bias", "base_model.model.classifier.weight"])
def test_one_head_that_vllm_knows_is_served(plain, key):
    found = with_config(replace(plain, heads={key: torch.ones(2, 3)}), modules_to_save=["classifier", "score"])
    assert refusal(found, shared=False) is None
    assert refusal(found, shared=True) is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["base_model.model.classifier.out_proj.weight"], "classifier.out_proj.weight"),
        (["base_model.model.model.embed_tokens.weight"], "embed_tokens"),
        (["base_model.model.model.layers.0.q_proj.bias"], "q_proj.bias"),
        ([HEAD, "base_model.model.classifier.weight"], "it has two"),
    ],
)
def test_other_heads_are_refused(plain, keys, said):
    found = replace(plain, heads={key: torch.ones(2, 3) for key in keys})
    why = refusal(with_config(found, modules_to_save=["classifier", "score"]), shared=False)
    assert said in why


def test_a_head_that_its_config_does_not_name_is_refused_as_vllm_would(plain):
    assert "score" in refusal(replace(plain, heads={HEAD: torch.ones(2, 3)}), shared=False)


def test_weights_of_the_base_model_beside_a_lora_of_its_embeddings_do_not_count(plain):
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert refusal(replace(plain, heads={key: torch.ones(5, 3)}), shared=False) is None


@pytest.mark.parametrize("key", ["lora_A.weight", "lora_embedding_A"])
def test_what_lies_outside_the_subspace_is_served_without_a_shared_basis_only(plain, key):
    found = replace(plain, carried={f"base_model.model.other.{key}": torch.ones(3, 7)})
    assert refusal(found, shared=False) is None
    assert f"'base_model.model.other.{key}' outside the subspace" in refusal(found, shared=True)


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("conv.lora_A.weight", (3, 5, 2, 2), "convolutions"),
        ("query.lora_magnitude_vector", (3,), "lora_magnitude_vector"),
        ("embed.trainable_tokens_delta", (3, 5), "trainable_tokens_delta"),
        ("query.lora_B.bias", (3,), "lora_B.bias"),
    ],
)
def test_tensors_that_vllm_would_not_read_are_refused(plain, key, shape, said):
    found = replace(plain, carried={f"base_model.model.{key}": torch.ones(shape)})
    assert said in refusal(found, shared=False)


@pytest.mark.parametrize("shared", [False, True])
def test_coefficients_of_a_convolution_are_refused(plain, shared):
    (module, *_), one = plain.coefficients, next(iter(plain.coefficients.values()))
    found = replace(plain, coefficients={**plain.coefficients, module: replace(one, kernel=(3, 3))})
    assert f"vLLM does not support LoRA on convolutions ('{module}')" in refusal(found, shared=shared)


def test_names_that_cannot_be_completed_are_refused(plain):
    short = replace(plain, subspace_names={module: f"model.{place}" for module, place in plain.subspace_names.items()})
    assert refusal(short, shared=False) is None
    found = replace(short, carried={"base_model.model.words.lora_embedding_A": torch.ones(3, 43)})
    assert "its modules lack the first part of the model's names" in refusal(found, shared=False)


def test_an_adapter_without_a_module_is_refused(plain):
    assert "no LoRA module" in refusal(replace(plain, coefficients={}, subspace_names={}), shared=True)


def test_the_rank_is_that_of_the_config_with_its_patterns(plain):
    assert expanded_rank(plain) == 3
    assert expanded_rank(with_config(plain, rank_pattern={"nowhere": 41})) == 41


def test_with_a_shared_basis_the_rank_is_at_most_the_number_of_components(tmp_path):
    make_adapter(tmp_path / "wide", seed=1, rank=9)
    make_adapter(tmp_path / "other", seed=2, rank=2)
    pack = ex.fit([tmp_path / "wide", tmp_path / "other"], n_components=5)
    assert expanded_rank(pack.packed("wide")) == 9
    assert shared_rank(pack.packed("wide")) == 5
    assert shared_rank(pack.packed("other")) == 2


def test_a_rank_beyond_what_vllm_has_is_refused(plain):
    found = with_config(plain, rank_pattern={"nowhere": RANKS[-1] + 1})
    assert f"its rank is {RANKS[-1] + 1}" in refusal(found, shared=False)
    assert refusal(found, shared=True) is None


def test_a_rest_has_no_place_between_shared_bases(plain):
    module, other, *_ = sorted(plain.coefficients)
    wide = {
        name: replace(one, up_residual=torch.ones(5, one.rank)) if name in (module, other) else one
        for name, one in plain.coefficients.items()
    }
    found = replace(plain, coefficients=wide)
    assert refusal(found, shared=False) is None
    assert refusal(found, shared=True) == (
        f"adapter 'alpha' cannot be served: it has a residual in {module!r} and 1 more modules, "
        "which the cores of a shared basis cannot represent; without a shared basis it can be served. A pack that is "
        "fitted for serving (purpose='serving', --for serving) represents it, and one with a basis of few components "
        "(basis=32, --basis 32) may."
    )


def test_one_that_has_a_rest_is_no_lora_of_cores(tmp_path):
    make_adapters(tmp_path / "in", "a0 a1")
    pack = with_rests(ex.fit(tmp_path / "in", n_components=4), {"a0": ["both"]})
    lora_on_cores(pack.packed("a1"), pack.info)
    with pytest.raises(ServingError, match="adapter 'a0' has a residual in 'encoder"):
        lora_on_cores(pack.packed("a0"), pack.info)
