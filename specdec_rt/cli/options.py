"""Options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

from specdec_rt.backends.availability import AUTO_ORDER

__all__ = [
    "MACHINE",
    "OUTPUT",
    "ArStepsOption",
    "BackendOption",
    "BundleArgument",
    "CacheOption",
    "JsonOption",
    "RecipeOption",
    "ThreadsOption",
    "WorkersOption",
]

MACHINE, OUTPUT = "Machine", "Output"
"""Headings in the help of commands with many options."""

BundleArgument = Annotated[
    str, typer.Argument(help='The bundle: its folder, or the name of an embedded one, such as "digits".')
]
ArStepsOption = Annotated[
    int | None, typer.Option(help="Autoregressive steps for each image; a causal family takes one for each token.")
]
BackendOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=MACHINE,
        help=f"What executes the graphs: {', '.join(AUTO_ORDER)}; auto takes the first of these that works here.",
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=MACHINE,
        metavar="FILE.toml",
        help="The recipe: the backend, and how its engines are built. "
        "The folder engines/recipes has one for each kind of machine.",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=MACHINE,
        metavar="DIR",
        help="The folder that built engines are kept in; by default the user's cache.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(rich_help_panel=MACHINE, help="CPU cores that the engines may use; by default all of them."),
]
WorkersOption = Annotated[
    int,
    typer.Option(
        rich_help_panel=MACHINE,
        help="Decoders that run at the same time, on a CPU; they share the images and the cores.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", rich_help_panel=OUTPUT, help="Print the result as one line of JSON on stdout instead of a table."
    ),
]
