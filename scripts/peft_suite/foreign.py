"""Tests inside the classes we run that are left out, by reason. None is about our tuner; the run prints them all."""

from importlib.util import find_spec

_BY_REASON = {
    "another method, on a model of the Hub": (
        "TestDecoderModels.test_generate_adalora_no_dropout",
        "TestDecoderModels.test_lora_embed_scale_is_applied",
        "TestDecoderModels.test_lora_embed_scale_is_applied_mixed_batch",
        "TestDecoderModels.test_lora_layer_replication",
        "TestDecoderModels.test_merge_and_unload_fixes_tie_word_embeddings_config",
        "TestDecoderModels.test_prefix_tuning_gemma4_raises_if_all_layers_skipped",
        "TestDecoderModels.test_prefix_tuning_gemma4_warns_if_some_layers_skipped",
        "TestDecoderModels.test_prefix_tuning_gemma4_works",
        "TestDecoderModels.test_prefix_tuning_mistral",
        "TestDecoderModels.test_prefix_tuning_offsets_position_ids_in_forward",
        "TestDecoderModels.test_prefix_tuning_qwen2_with_grouped_query_attention",
        "TestDecoderModels.test_prefix_tuning_qwen3_with_grouped_query_attention",
        "TestDecoderModels.test_prompt_learning_with_gradient_checkpointing",
        "TestDecoderModels.test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask",
        "TestDecoderModels.test_prompt_tuning_text_tokenizer_kwargs",
        "TestDecoderModels.test_prompt_tuning_trust_remote_code",
        "TestDecoderModels.test_save_pretrained_targeting_lora_to_embedding_layer",
        "TestEncoderDecoderModels.test_active_adapters_prompt_learning",
        "TestEncoderDecoderModels.test_save_shared_tensors",
        "TestPeftCustomModel.test_delete_adapter_multiple_adapters_with_trainable_token_indices",
        "TestPeftCustomModel.test_dora_save_and_load_remapping",
        "TestPeftCustomModel.test_gpt2_dora_merge_and_unload",
        "TestPeftCustomModel.test_gpt2_dora_merge_and_unload_safe_merge",
        "TestPeftCustomModel.test_multiple_adapters_automatic_modules_to_save",
        "TestPeftCustomModel.test_multiple_adapters_no_needless_copy_modules_to_save",
        "TestPeftCustomModel.test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
        "TestPeftCustomModel.test_pvera_reproducible",
    ),
    "reads the config of a LoRA on the Hub": (
        "TestPeftConfig.test_from_pretrained",
        "TestPeftConfig.test_from_pretrained_cache_dir",
        "TestPeftConfig.test_from_pretrained_cache_dir_remote",
        "TestPeftConfig.test_save_pretrained_with_runtime_config",
    ),
    "prefix tuning, which BERT of newer transformers has no cache for": (
        "TestSequenceClassificationModels.test_prompt_learning_forward_with_inputs_embeds",
    ),
}
if find_spec("sklearn") is None:
    _BY_REASON["makes a config of every method, and AdaMSS's needs scikit-learn"] = (
        "TestPeftConfig.test_from_peft_type",
    )
FOREIGN = {name: reason for reason, names in _BY_REASON.items() for name in names}
