"""`lediflow`: gathers the commands, and turns a user's mistake into a short message and exit code 2."""

from __future__ import annotations

import sys
import warnings

import typer

from lediflow import __version__
from lediflow.cli import benchmark, data, demo, diagnose, encode, evaluate, presets, sample, train
from lediflow.errors import UserError

app = typer.Typer(
    name="lediflow",
    help="Image generators that answer in few network evaluations, trained on your own pictures.\n\n"
    "Start with `lediflow demo`, then `lediflow train flowers-64 --data FOLDER`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(train.train)
app.command()(sample.sample)
app.command()(evaluate.evaluate)
app.command()(diagnose.diagnose)
app.command()(benchmark.benchmark)
app.command()(encode.encode)
app.add_typer(data.app, name="data")
app.command()(presets.presets)


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
    warnings.showwarning = _show_warning
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        _leave_launch()


def _leave_launch() -> None:
    """Part from the other processes of a launch; torch aborts a process that ends without doing so."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _show_warning(message, category, *_args, **_kwargs) -> None:
    # a user reads what is wrong; where in the source it was said is for developers
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
