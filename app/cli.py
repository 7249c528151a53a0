"""`shoal`: the command line. Puts the commands together and turns every failure into one line and an exit code.

`ask`, `ingest` and `status` are clients of the public HTTP API; `keys` and `jobs` talk to Redis; `simulate` computes.
None of them starts or joins Ray. Each command has its module `app.cli_*`.
"""

from __future__ import annotations

import logging
import sys
from importlib import metadata
from typing import Annotated, Any

import structlog
import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, Exit, TyperException

from actors.errors import ShoalError
from app import cli_ask, cli_ingest, cli_jobs, cli_keys, cli_simulate, cli_status
from app.cli_output import CliError, ExitCode, one_line, say

_EPILOG = (
    "Exit codes: 0 done; 1 refused, some file failed, or a component is not ready; 2 wrong command line; "
    "3 nothing answers; 130 stopped by Ctrl-C."
)


class _Commands(TyperGroup):
    """Ends every command with an exit code of ours; no traceback unless --debug."""

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        _quiet_logs(debug=debug)
        try:
            return super().invoke(ctx)
        except (Exit, Abort, TyperException, BrokenPipeError):  # typer's own ways to end
            raise
        except KeyboardInterrupt:
            raise Exit(ExitCode.INTERRUPTED) from None
        except Exception as error:
            if debug:
                raise
            say(f"error: {_words(error)}")
            code = error.exit_code if isinstance(error, CliError) else ExitCode.FAILED
            raise Exit(code) from None


def _words(error: Exception) -> str:
    if isinstance(error, CliError):
        return error.message
    if isinstance(error, ShoalError):
        return f"{error.message} ({error.code})"
    return f"{type(error).__name__}: {one_line(str(error), 300)}; run it as `shoal --debug …` to see where"


def _quiet_logs(*, debug: bool) -> None:
    """The stores log for servers; here the error that they raise says it."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.CRITICAL),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {metadata.version('shoal')}")
        raise Exit(ExitCode.OK)


app = typer.Typer(
    cls=_Commands,
    help="Ask, ingest and look after a Shoal.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command()(cli_ask.ask)
app.command()(cli_ingest.ingest)
app.command()(cli_status.status)
app.command()(cli_simulate.simulate)
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_jobs.app, name="jobs")


def main() -> None:
    """The entry point."""
    app()
