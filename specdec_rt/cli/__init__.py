"""The command line: `specdec-rt generate`, `inspect`, `build`, `bench` and `doctor`.

Results go to stdout or to files, messages to stderr. Exit codes: 0, 1 for a failure, 2 for bad usage or input, 130
for an interrupt.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

import typer

from specdec_rt.cli.bench import bench_command
from specdec_rt.cli.build import build_command
from specdec_rt.cli.doctor import doctor_command
from specdec_rt.cli.generate import generate_command
from specdec_rt.cli.inspect import inspect_command
from specdec_rt.errors import SpecDecError

__all__ = ["COMMANDS", "app", "main", "make_app"]

COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate_command,
    "inspect": inspect_command,
    "build": build_command,
    "bench": bench_command,
    "doctor": doctor_command,
}


def make_app(commands: Mapping[str, Callable[..., None]] = COMMANDS) -> typer.Typer:
    """The Typer application of these commands."""
    app = typer.Typer(
        help="Speculative decoding for autoregressive image models with continuous tokens, without torch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # an unexpected error is for a bug report: it keeps its plain traceback
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in commands.items():
        app.command(name)(command)
    return app


app = make_app()


def main(arguments: Sequence[str] | None = None, *, app: typer.Typer = app) -> None:
    """Run the command line `arguments` (None: those of the process) and exit."""
    try:
        app(args=arguments, prog_name="specdec-rt")
    except SpecDecError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
