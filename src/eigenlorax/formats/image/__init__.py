"""LoRA files of image models in the dialects of kohya and diffusers, and the names of their modules."""
