"""Whole jobs on real models: what imports peft and transformers."""
