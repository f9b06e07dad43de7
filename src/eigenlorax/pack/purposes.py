"""Sentences about what a pack was made for and what it cannot do, for `fit`, `inspect` and the model card."""

from ..codec.storage.traits import TRAITS
from .summary import Summary

STORAGE_ERROR = 0.1
"""Largest delta error with which adapters of a pack are called close to their originals; the default of `fit`."""

_REASONS = {
    "training": "new tasks train coefficients of these components",
    "serving": "one shared basis serves every adapter within its error",
}


def choice(figures: Summary) -> str:
    """Return the purpose of a pack, the target and storage of its fit, and the reason for them, in one sentence."""
    fit = figures.fit
    lead = f"for {fit.purpose}: " if fit.purpose is not None else ""
    if TRAITS[figures.dtype].is_coded:
        extent = "in as few bytes as that takes" if fit.max_error is not None else "with the smallest errors"
        return f"{lead}{fit.size}, {extent} (entropy-coded)"
    dtype = f"stored as {figures.dtype}"
    if figures.coefficient_dtype != figures.dtype:
        dtype += f", coefficients {figures.coefficient_dtype}"
    reason = _REASONS.get(fit.purpose or "")
    return f"{lead}{fit.size}, {dtype}" + (f": {reason}" if reason else "")


def limits(figures: Summary) -> str:
    """Return what a pack cannot do, with the option of `fit` that does it. Names are those of Python and the command.

    Verbs replace Python's names (`cli/spelling.py`).
    """
    if figures.basis is not None:
        return (
            f"new tasks train on its basis, which takes {figures.bytes.training_basis:,} bytes. vLLM's shared basis "
            "serves only adapters that this basis represents well enough: serve-check lists them"
        )
    if TRAITS[figures.dtype].is_coded:
        return (
            "not for training new tasks, nor for vLLM's shared basis. For both, add a basis with basis=32 "
            "(--basis 32). For one of them, fit with purpose='training' (--for training) or purpose='serving' "
            "(--for serving)"
        )
    losses = []
    worst = max((errors.worst for errors in (figures.in_fit, figures.projected) if errors is not None), default=0.0)
    if worst > max(STORAGE_ERROR, figures.fit.max_error or 0.0):
        losses.append(f"not in place of the originals: an adapter loses up to {worst:.3f} of its update")
    is_larger = 0 < figures.bytes.ratio < 1
    if is_larger:
        trained = figures.adapters - len(figures.untrained)
        losses.append(
            "larger than the LoRAs, of which too few share its bases"
            if trained > 1
            else "larger than the LoRA, because one adapter has nothing to share its basis with"
        )
    if not losses:
        return "takes more bytes than with purpose='storage' (--for storage) and the same errors"
    fewer = " in fewer bytes" if is_larger else ""
    return f"{'; '.join(losses)}. purpose='storage' (--for storage) keeps all within {STORAGE_ERROR:g}{fewer}"
