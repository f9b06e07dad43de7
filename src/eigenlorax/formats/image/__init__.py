"""LoRA files of image models: the dialects of kohya and diffusers, and the names of their modules."""
