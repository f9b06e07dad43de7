"""Settings of the page: limits of its input, and the addresses that may use it."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

HOST, PORT = "127.0.0.1", 7860
"""Default address."""
MAX_UPLOAD = 500_000_000
"""Default limit of a user's uploads, in bytes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of the page's input.

    Attributes:
        workspace: Existing folder for uploads and packs of all users.
        max_upload: Maximum size of a user's uploads together, unpacked, in bytes.
        allows_paths: True to read folders of this machine, and private repositories with its token of the Hub.
    """

    workspace: Path
    max_upload: int = MAX_UPLOAD
    allows_paths: bool = False


def is_private(host: str) -> bool:
    """Return whether only users of this machine reach a server at this host; False in a Hugging Face Space."""
    # the platform of Spaces sets it
    if "SPACE_ID" in os.environ:
        return False
    return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
