"""The command line: which commands there are, and how every one of them ends.

Exit codes: 0 done; 1 a check found something, or our own bug; 2 the command cannot be carried out, with one
line that says why; 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Final

import typer

from pdserve import __version__
from pdserve.cli.access import ApiKey, TlsCa, TlsCert, TlsKey, remember
from pdserve.cli.bench import bench_app
from pdserve.cli.configuration import config_app
from pdserve.cli.console import fail, log_handler
from pdserve.cli.demo import demo
from pdserve.cli.deploy import deploy_app
from pdserve.cli.doctor import doctor
from pdserve.cli.drain import drain, undrain
from pdserve.cli.explain import explain
from pdserve.cli.generate import generate
from pdserve.cli.health import health
from pdserve.cli.keys import keys_app
from pdserve.cli.logs import logs
from pdserve.cli.models import models_app
from pdserve.cli.plan import plan
from pdserve.cli.replay import replay
from pdserve.cli.scale import scale
from pdserve.cli.serve import serve
from pdserve.cli.simulate import simulate
from pdserve.client import Access
from pdserve.core.errors import PdServeError

_UsageError: Final = typer.BadParameter.__mro__[2]
"""What the parser raises for a wrong command line; typer exports no name for it."""

app = typer.Typer(
    name="pdserve",
    help=(
        "Serve large language models with prompts read and answers written on separate workers.\n\n"
        "Start with [bold]pdserve demo[/]. Then [bold]pdserve serve --model PATH[/] in one terminal and "
        '[bold]pdserve generate "your prompt"[/] in another. [bold]pdserve doctor[/] says what is missing.'
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(generate)
app.command()(demo)
app.command()(doctor)
app.command()(health)
app.command()(drain)
app.command()(undrain)
app.command()(scale)
app.command()(explain)
app.command()(logs)
app.command()(plan)
app.command()(simulate)
app.command()(replay)
app.add_typer(bench_app, name="bench")
app.add_typer(models_app, name="models")
app.add_typer(config_app, name="config")
app.add_typer(deploy_app, name="deploy")
app.add_typer(keys_app, name="keys")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pdserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens, and show tracebacks.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    remember(Access(api_key=api_key, ca_file=tls_ca, cert_file=tls_cert, key_file=tls_key))
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(name)s: %(message)s" if verbose else "%(message)s",
        handlers=[log_handler()],
    )


def main() -> None:
    """Run the command line and exit; never with a traceback, unless --verbose asks for it."""
    try:
        code = app(standalone_mode=False)
    except PdServeError as error:
        fail(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # the outermost loop: whatever is left is our own bug
        if isinstance(error, _UsageError):
            fail(_usage(error))
            code = 2
        else:
            if logging.getLogger().isEnabledFor(logging.INFO):
                raise
            fail(f"unexpected {type(error).__name__}: {error} (a bug; `pdserve --verbose ...` shows where)")
            code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Exception) -> str:
    format_message = getattr(error, "format_message", lambda: str(error))
    return f"{format_message()} (try --help)"
