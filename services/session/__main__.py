"""The session service's commands: `python -m services.session [serve | migrate | bootstrap | tenant]`."""

import argparse
import sys
from functools import partial

from meshkit.server import run
from meshkit.settings import load
from services.session import app
from services.session.operations.bootstrap import TENANT
from services.session.operations.tenant import POLICIES
from services.session.settings import SessionSettings


def main() -> None:
    """Runs one command; ends the process with status 1 and one line on stderr if it cannot."""
    parser = argparse.ArgumentParser(prog="python -m services.session", description="The session service.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("serve", help="serve until SIGTERM (the default)")
    migrate = commands.add_parser("migrate", help="bring the database's schema up to date")
    migrate.add_argument("--pre", action="store_true", help="only what the version before survives")
    bootstrap = commands.add_parser("bootstrap", help="make a tenant and its key, unless they are there")
    bootstrap.add_argument("--tenant", default=TENANT, help="the tenant's name (%(default)s)")
    bootstrap.add_argument(
        "--api-key-env", default="HERMESH_API_KEY", help="the variable that holds the key (%(default)s)"
    )
    tenant = commands.add_parser("tenant", help="show a tenant's settings, and change those that are given")
    tenant.add_argument("--name", default=TENANT, help="the tenant's name (%(default)s)")
    tenant.add_argument(
        "--concurrency", choices=POLICIES, help="what happens to input for a busy session that does not say"
    )
    tenant.add_argument(
        "--require-approval",
        metavar="TOOLS",
        help="tools whose every call a person must approve, separated by commas; * for all, '' for none",
    )
    tenant.add_argument(
        "--run-timeout",
        type=float,
        metavar="SECONDS",
        help="time limit of runs that set none; 0 for the service's own",
    )
    arguments = parser.parse_args()
    settings = load(SessionSettings)
    if arguments.command == "migrate":
        run(partial(app.migrate, settings, arguments.pre, sys.stdout))
    elif arguments.command == "bootstrap":
        run(partial(app.bootstrap, settings, arguments.tenant, arguments.api_key_env, sys.stdout))
    elif arguments.command == "tenant":
        words = (arguments.concurrency, arguments.require_approval, arguments.run_timeout)
        run(partial(app.tenant, settings, arguments.name, words, sys.stdout))
    else:
        run(partial(app.serve, settings))


main()
