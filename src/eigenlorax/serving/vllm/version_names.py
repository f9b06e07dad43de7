"""Names of versions in vLLM, such as "run@1000:0f3a6c12b4d5e697": the version, and a digest of its content.

vLLM keeps the KV cache of prompts by the name of a LoRA. With the digest in it, a label that is used again for another
adapter, and "run@latest", never meet a cache of earlier content. Nothing here imports vLLM.
"""

from ...pack.pack import Pack

_MARK = ":"
_CHARACTERS = 16
"""Hexadecimal digits of the digest in a name."""


def vllm_name(pack: Pack, version: str) -> str:
    """Return the name of a version in vLLM.

    Args:
        pack: The pack.
        version: Name of the version, such as "run@1000" or "run@latest".

    Raises:
        AdapterNameError: The pack has no such version.
    """
    history, record = pack.history_store.find(version)
    return f"{history.full_name(record)}{_MARK}{history.digest(record)[:_CHARACTERS]}"


def without_digest(name: str) -> str:
    """Return the name of a version without the digest, if there is one."""
    return name.partition(_MARK)[0]
