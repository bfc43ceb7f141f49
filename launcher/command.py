"""Where the command `hermesh` begins."""

import signal


def main() -> None:
    """Runs the command; Ctrl-C while Python still reads modules ends it without a word."""
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launcher.cli import main

    signal.signal(signal.SIGINT, handler)
    main()
