"""Imported once, before processes are forked."""

import torch
import transformers

from eigenlorax import fitting, tuner

__all__ = ["fitting", "tuner"]

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
