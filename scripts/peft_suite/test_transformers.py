"""Four files of PEFT's tests on models of transformers, with small ones of ours in place of those on the Hub."""

import pytest
from peft import LoraConfig, get_peft_model
from peft_tests import test_decoder_models as decoder
from peft_tests import test_encoder_decoder_models as encoder_decoder
from peft_tests import test_feature_extraction_models as feature_extraction
from peft_tests import test_seq_classifier as seq_classifier

from . import packs, subject

QUICK_MODELS = ("LlamaForCausalLM", "GPT2LMHeadModel", "T5", "BertModel", "LlamaForSequenceClassification")


def use_local(model_ids: list[str]) -> None:
    wanted = [one for one in model_ids if not subject.quick or any(name in one for name in QUICK_MODELS)]
    model_ids[:] = [packs.local(one) for one in wanted]


use_local(decoder.PEFT_DECODER_MODELS_TO_TEST)
use_local(encoder_decoder.PEFT_ENCODER_DECODER_MODELS_TO_TEST)
use_local(feature_extraction.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST)
use_local(seq_classifier.PEFT_SEQ_CLS_MODELS_TO_TEST)
subject.rows(decoder.ALL_CONFIGS, subject.variants(task_type="CAUSAL_LM"))
subject.rows(encoder_decoder.ALL_CONFIGS, subject.variants(task_type="SEQ_2_SEQ_LM"))
subject.rows(feature_extraction.ALL_CONFIGS, subject.variants(task_type="FEATURE_EXTRACTION"))
subject.rows(seq_classifier.ALL_CONFIGS, subject.variants(task_type="SEQ_CLS"))


def works_at_all(seq2seq: str) -> bool:
    """Whether this PEFT can adapt an encoder-decoder of this transformers, with LoRA: 0.21.0 cannot with 5.23.0."""
    model = encoder_decoder.AutoModelForSeq2SeqLM.from_pretrained(seq2seq)
    try:
        get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM"))
    except AttributeError:
        return False
    return True


class TestDecoderModels(decoder.TestDecoderModels):
    """As it is."""


@pytest.mark.skipif(
    not works_at_all(encoder_decoder.PEFT_ENCODER_DECODER_MODELS_TO_TEST[0]),
    reason="this PEFT cannot adapt an encoder-decoder of this transformers by any method, LoRA included",
)
class TestEncoderDecoderModels(encoder_decoder.TestEncoderDecoderModels):
    """As it is."""


class TestPeftFeatureExtractionModel(feature_extraction.TestPeftFeatureExtractionModel):
    """As it is."""


class TestSequenceClassificationModels(seq_classifier.TestSequenceClassificationModels):
    """As it is."""
