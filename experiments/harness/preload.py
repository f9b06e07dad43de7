"""Imported once, before processes are forked."""

import contextlib

import torch
import transformers

from eigenlorax import tuner
from eigenlorax.fitting import fit

__all__ = ["fit", "tuner"]

with contextlib.suppress(ImportError):
    # the experiment on pictures has it
    from diffusers import DDIMScheduler, UNet2DConditionModel  # noqa: F401

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
