"""`lediflow app`: a page in the browser to create, explore and edit pictures with a model."""

from __future__ import annotations

import signal
import sys
import time
from typing import Annotated

import typer

from lediflow.cli.options import CodecFolder, Device, Dtype, TextEncoderFolder

MODEL, UPSAMPLER = "emoji", "emoji-x4"


def app(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Run folder, saved pipeline folder, Hub id, or a built-in name."
        ),
    ] = MODEL,
    upsampler: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"Also show a tab that enlarges. Default: {UPSAMPLER} with {MODEL}, else none.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets in everybody who reaches this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Default: the first free one from 7860 on.", show_default=False)
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also under a public address, by Gradio's servers.")
    ] = False,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page.")] = False,
    max_file_mb: Annotated[int, typer.Option(help="Largest file that may be uploaded.")] = 20,
    max_pictures: Annotated[int, typer.Option(help="Most pictures of one request.")] = 64,
    max_queue: Annotated[int, typer.Option(help="Most requests that wait.")] = 32,
    codec: CodecFolder = None,
    text_encoder: TextEncoderFolder = None,
    device: Device = None,
    dtype: Dtype = "fp32",
) -> None:
    """Open a page in the browser: create, explore and edit pictures, and look inside.

    It needs `pip install 'lediflow[app]'`, answers on this machine alone, and asks nothing of any other. What
    visitors upload and make lies in a private folder, which is removed when the page ends (Ctrl-C).

    Examples:

        lediflow app

        lediflow app runs/flowers --upsampler runs/flowers-x4 --port 8000
    """
    from lediflow.app.limits import Limits
    from lediflow.app.models import Models
    from lediflow.app.serve import served

    limits = Limits(
        pictures=_positive("--max-pictures", max_pictures),
        file_mb=_positive("--max-file-mb", max_file_mb),
        queue=_positive("--max-queue", max_queue),
    )
    if upsampler is None and model == MODEL:
        upsampler = UPSAMPLER
    models = Models.load(
        model, upsampler=upsampler, codec=codec, text_encoder=text_encoder, device=device, dtype=dtype
    )
    if share:
        print(
            "warning: --share puts this page on the internet for a week; whoever knows its address can "
            "use this machine, and may pass it on",
            file=sys.stderr,
        )
    elif host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: everybody who reaches this machine at {host} can use the page", file=sys.stderr)
    signal.signal(signal.SIGTERM, _end)
    with served(models, limits, host=host, port=port, share=share, browser=browser) as page:
        print(f"{page.url} (Ctrl-C ends it)", flush=True)
        if page.shared:
            print(f"{page.shared}, for everybody who knows it", flush=True)
        while True:
            time.sleep(3600)


def _end(_signal: int, _frame: object) -> None:
    """End as by Ctrl-C, so that what visitors left is removed."""
    raise KeyboardInterrupt


def _positive(name: str, value: int) -> int:
    from lediflow.errors import UserError

    if value < 1:
        raise UserError(f"{name} must be at least 1, not {value}")
    return value
