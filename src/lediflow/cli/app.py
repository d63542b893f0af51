"""`lediflow`: gathers the commands, and turns a user's mistake into a short message and exit code 2."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from io import TextIOWrapper

import typer

from lediflow import __version__
from lediflow.cli import (
    anonymize,
    benchmark,
    browser,
    clusters,
    config,
    data,
    demo,
    diagnose,
    encode,
    env,
    evaluate,
    export,
    inpaint,
    interpolate,
    presets,
    push,
    reconstruct,
    restyle,
    sample,
    train,
    upsample,
    vary,
)
from lediflow.errors import UserError
from lediflow.files import shown

app = typer.Typer(
    name="lediflow",
    help="Image generators that answer in few network evaluations, trained on your own pictures.\n\n"
    "Start with `lediflow demo`, then `lediflow train flowers-64 --data FOLDER`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(train.train)
app.command()(sample.sample)
app.command()(clusters.clusters)
app.command()(reconstruct.reconstruct)
app.command()(interpolate.interpolate)
app.command()(vary.vary)
app.command()(inpaint.inpaint)
app.command()(restyle.restyle)
app.command()(upsample.upsample)
app.command()(evaluate.evaluate)
app.command()(diagnose.diagnose)
app.command()(benchmark.benchmark)
app.command()(anonymize.anonymize)
app.command()(export.export)
app.command()(push.push)
app.command()(browser.app)
app.command()(encode.encode)
app.add_typer(data.app, name="data")
app.command()(presets.presets)
app.command()(config.config)
app.command()(env.env)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lediflow {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; the entry point of `lediflow` and `python -m lediflow`."""
    _let_threads_sleep()
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a file name need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        _run()
    except SystemExit as ended:
        _leave_launch(ended.code if isinstance(ended.code, int) else 0)
        raise


def _run() -> None:
    try:
        app()
    except UserError as error:
        print(f"error: {_printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _let_threads_sleep() -> None:
    """Keep OpenMP's threads from spinning while they wait, which takes the cores from whoever needs them.

    On a machine with other work that makes training several times slower. It must be said before torch loads;
    what the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _leave_launch(code: int) -> None:
    """End a process that was launched with others; return if it was launched alone.

    It parts from the others, since torch aborts a process that does not. Then it ends without taking torch
    down: done by the interpreter that now and then destroys a thread that still runs, and a process whose
    work is done and written aborts.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _show_warning(message, category, *_args, **_kwargs) -> None:
    # a user reads what is wrong; where in the source it was said is for developers
    if issubclass(category, UserWarning):
        print(f"warning: {_printable(message)}", file=sys.stderr)


def _printable(message: object) -> str:
    """Escape what a terminal would obey; messages name files, and anybody may have named those."""
    return "\n".join(shown(line) for line in str(message).split("\n"))
