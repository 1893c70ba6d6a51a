"""``attsvm``: the commands, and how errors become one sentence and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from attsvm import __version__
from attsvm.cli import compare, compare_rnn, doctor, generate, inspect, report, reproduce, serve, solve, verify
from attsvm.cli.exits import exit_code
from attsvm.cli.terminal import complain
from attsvm.errors import AttSVMError

__all__ = ["app", "run"]

app = typer.Typer(
    name="attsvm",
    help="Which tokens attention selects, with what margin, and where training takes them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("verify")(verify.verify_command)
app.command("inspect")(inspect.inspect_command)
app.command("compare")(compare.compare_command)
app.command("serve")(serve.serve_command)
app.command("solve")(solve.solve_command)
app.command("reproduce")(reproduce.reproduce_command)
app.command("generate")(generate.generate_command)
app.command("translate")(generate.translate_command)
app.command("compare-rnn")(compare_rnn.compare_rnn_command)
app.command("report")(report.report_command)
app.command("doctor")(doctor.doctor_command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"attsvm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that come before the command."""


def run() -> None:
    """Run the command line and exit."""
    try:
        app()
    except AttSVMError as error:
        complain(str(error))
        sys.exit(exit_code(error))
    except KeyboardInterrupt as error:
        complain("interrupted.")
        sys.exit(exit_code(error))
    except MemoryError:
        complain("out of memory; use fewer sequences (--n-sequences) or shorter ones (--max-tokens).")
        sys.exit(1)
    except OSError as error:
        complain(f"{error.filename or 'a file'}: {error.strerror or error}.")
        sys.exit(1)
