"""The server of the page: its address, its limits, and the rule that browsers fetch nothing from elsewhere."""

import importlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, OptionError, reason
from . import settings
from .settings import HOST, MAX_UPLOAD, PORT, Settings

HOW = "The web page needs gradio, matplotlib and SciPy: pip install 'eigenlorax[app]'."
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)
"""Content-Security-Policy of every answer. gradio's page names fonts and scripts of other servers."""


class _PolicyMiddleware:
    """ASGI middleware that adds `POLICY` to every answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


@contextmanager
def running(host: str = HOST, port: int = PORT, max_upload: int = MAX_UPLOAD) -> Iterator[str]:
    """Serve the page, and yield its URL. Uploads and packs are removed at the end.

    Args:
        host: Host name or IPv4 address to listen at. On an address that other machines reach, and in a Hugging Face
            Space, the page reads no folders of this machine.
        port: Port to listen at.
        max_upload: Maximum size of a user's uploads together, unpacked, in bytes.

    Raises:
        MissingExtraError: A package of the extra `app` is not installed.
        OptionError: The server cannot listen at this address.
    """
    _check_address(host, port)
    # before gradio is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for package in ("matplotlib", "scipy", "gradio"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(HOW) from error
    with tempfile.TemporaryDirectory(prefix="eigenlorax-app-", ignore_cleanup_errors=True) as folder:
        workspace, uploads = (Path(folder, name) for name in ("packs", "uploads"))
        workspace.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        with _launched(Settings(workspace, max_upload, settings.is_private(host)), host, port) as url:
            yield url


def wait() -> None:
    """Wait until the process is interrupted or terminated, which raises `KeyboardInterrupt`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Event().wait()


@contextmanager
def _launched(accepted: Settings, host: str, port: int) -> Iterator[str]:
    import gradio
    from starlette.middleware import Middleware

    from . import page

    blocks = page.build(accepted)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=False,
            quiet=True,
            footer_links=[],
            max_file_size=accepted.max_upload,
            prevent_thread_lock=True,
            theme=theme,
            css_paths=page.STYLE,
            app_kwargs={"middleware": [Middleware(_PolicyMiddleware)]},
        )
        yield url.rstrip("/")
    finally:
        blocks.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    """Raise `OptionError` unless a server can listen at the address."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError, TypeError, UnicodeError) as error:
        raise OptionError(
            f"a server cannot listen at host={host!r} (--host), port={port} (--port): {reason(error)}. Pass another "
            "one; if the port is in use, the page may be open already."
        ) from error
