"""Start the page and end it: a private folder, no word to the outside, nothing left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lediflow.app.guard import Guard
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.errors import UserError

_LOCAL = ("127.0.0.1", "localhost", "::1")
_QUIET = {  # before Gradio is imported
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_ALLOWED_PATHS": "",
    "GRADIO_SHARE": "False",
}


@dataclass(frozen=True)
class Served:
    """A page that answers.

    Attributes:
        url: on this machine.
        shared: its public address; None for none.
        folder: uploads and pictures.
        blocks: the Gradio app.
    """

    url: str
    shared: str | None
    folder: Path
    blocks: Any


@contextmanager
def served(
    models: Models,
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    browser: bool = False,
) -> Iterator[Served]:
    """Serve the page while the `with` block runs; then all that visitors left is removed.

    Args:
        models: what it works with.
        limits: for each visitor.
        host: address to listen at; 127.0.0.1 is this machine alone.
        port: None for the first free one from 7860 on.
        share: also under a public address, by Gradio's servers.
        browser: open it in a browser.

    Raises:
        UserError: Gradio is missing, or the port is taken.
    """
    before = {name: os.environ.get(name) for name in [*_QUIET, "GRADIO_TEMP_DIR"]}
    folder = Path(tempfile.mkdtemp(prefix="lediflow-app-")).resolve()  # 0700: nobody else's to read
    os.environ.update(_QUIET, GRADIO_TEMP_DIR=str(folder))
    blocks: Any = None
    try:
        try:
            from starlette.middleware import Middleware

            from lediflow.app.page import CSS, page, theme
        except ImportError as error:
            raise UserError(f"the app needs Gradio: pip install 'lediflow[app]' ({error})") from None
        blocks = page(models, limits, folder)
        guard = Middleware(
            Guard,
            folder=folder,
            most_bytes=(limits.file_mb + 1) * 2**20,
            local=host in _LOCAL and not share,
        )
        try:
            _, url, shared = blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                inbrowser=browser,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                max_file_size=limits.file_mb * 2**20,
                max_threads=8,
                state_session_capacity=limits.sessions,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                strict_cors=True,
                app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
                theme=theme(),
                css=CSS,
            )
        except OSError as error:
            raise UserError(f"cannot listen at {host}, port {port or '7860 to 7959'}: {error}") from None
        yield Served(url, shared, folder, blocks)
    finally:
        if blocks is not None:
            blocks.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
