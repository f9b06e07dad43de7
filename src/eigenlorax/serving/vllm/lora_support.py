"""Requirements of vLLM's LoRA: an architecture that supports it, and a GPU for experts. Nothing here imports vLLM.

The architectures without LoRA are those of vLLM 0.32, whose class for such a model lacks its interface `SupportsLoRA`:
`--enable-lora` ends the server with "does not support LoRA yet". `tests/serving/test_lora_support.py` compares them
with vLLM's classes.
"""

from .engine_version import RUN_WITH

_TEXT = """
    BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM BloomForCausalLM Cohere2MoeForCausalLM DbrxForCausalLM
    DeepseekV4ForCausalLM FalconForCausalLM FalconMambaForCausalLM Gemma3nForCausalLM Glm5NextForCausalLM
    GPT2LMHeadModel GPTJForCausalLM HrmTextForCausalLM HCXVisionV2ForCausalLM IQuestLoopCoderForCausalLM
    KimiLinearForCausalLM MambaForCausalLM Mamba2ForCausalLM MiniMaxM3SparseForCausalLM MiMoV2FlashForCausalLM
    MiMoV2ForCausalLM OrionForCausalLM Step1ForCausalLM Step3TextForCausalLM Step3p5ForCausalLM StableLmForCausalLM
    Zamba2ForCausalLM
"""
_ENCODERS = """
    BertForMaskedLM Gemma3TextModel GteModel GteNewModel NomicBertModel CLIPModel EmbeddingGemma2Model SiglipModel
    BertForTokenClassification ModernBertForTokenClassification OpenAIPrivacyFilterForTokenClassification
    RobertaForTokenClassification XLMRobertaForTokenClassification BertForSequenceClassification
    GPT2ForSequenceClassification GteNewForSequenceClassification ModernBertForSequenceClassification
"""
_IMAGES_AND_SOUND = """
    AriaForConditionalGeneration BailingMoeV3VLForConditionalGeneration BeeForConditionalGeneration
    Cohere2VisionForConditionalGeneration Cosmos3EdgeForConditionalGeneration DeepseekVLV2ForCausalLM
    DeepseekV4ForConditionalGeneration DeepseekV41ForCausalLM FireRedASR2ForConditionalGeneration
    FunAudioChatForConditionalGeneration Gemma3nForConditionalGeneration DiffusionGemmaForBlockDiffusion
    KimiVLForConditionalGeneration KimiK25ForConditionalGeneration KimiK3ForConditionalGeneration
    MoonshotKimiaForCausalLM MossTranscribeDiarizeForConditionalGeneration LlavaOnevisionForConditionalGeneration
    LlavaOnevision2ForConditionalGeneration MiMoV2OmniForCausalLM MiniMaxM3SparseForConditionalGeneration
    Moondream3ForCausalLM HfMoondream OpenVLAForActionPrediction Ovis Ovis2_5 Ovis2_6ForCausalLM Ovis2_6_MoeForCausalLM
    PaddleOCRVLForConditionalGeneration Phi3VForCausalLM Phi4ForCausalLMV Qwen2AudioForConditionalGeneration
    RForConditionalGeneration SkyworkR1VChatModel StepVLForConditionalGeneration Step3VLForConditionalGeneration
    Step3p7ForConditionalGeneration NemotronParseForConditionalGeneration
"""
WITHOUT_LORA = frozenset(f"{_TEXT} {_ENCODERS} {_IMAGES_AND_SOUND}".split())
"""Architectures for which vLLM's own class has no LoRA."""
WITH_TRANSFORMERS = frozenset({"StableLmForCausalLM"})
"""Those of them that `--model-impl transformers` serves with LoRA, vLLM's layers in the class of transformers: all that
`tests/serving/test_families.py` was run with."""


def experts_note(model: str) -> str:
    """Return a note on the kernels that vLLM needs for a mixture of experts with LoRA.

    It chooses them when the server starts, even if no adapter has a LoRA of experts.

    Args:
        model: Name of the model.
    """
    return (
        f"{model} is a mixture of experts: with LoRA, vLLM {RUN_WITH} computes its experts by kernels for GPUs (Triton "
        "or FlashInfer), and a server on a CPU ends with an error."
    )


def model_impl(architecture: str | None) -> str | None:
    """Return vLLM's `--model-impl` for adapters of a model; None for the default.

    Args:
        architecture: The class that the model's config names.
    """
    return "transformers" if architecture in WITH_TRANSFORMERS else None


def model_impl_note(architecture: str | None) -> str | None:
    """Return a note if the commands choose another implementation than vLLM's default; None if they do not."""
    implementation = model_impl(architecture)
    if implementation is None:
        return None
    return (
        f"vLLM {RUN_WITH} has no LoRA in its own class for {architecture}: the commands choose vLLM's implementation "
        f"with {implementation} (--model-impl {implementation})."
    )


def refusal_reason(architecture: str | None) -> str | None:
    """Return why vLLM can serve no adapter of a model; None if it can, or if the architecture is unknown.

    Args:
        architecture: The class that the model's config names.
    """
    if architecture not in WITHOUT_LORA or model_impl(architecture) is not None:
        return None
    return (
        f"vLLM {RUN_WITH} has no LoRA for models of the architecture {architecture}, and a server with --enable-lora "
        "does not start; serve the pack with an AdapterBank or Router"
    )
