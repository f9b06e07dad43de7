"""Training, evaluation and comparison on real models. Imports peft and transformers."""
