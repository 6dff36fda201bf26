"""The `sdd` command, also as `python -m sdd`."""

import sys


def main() -> int:
    """Run a command; returns its exit code. Ctrl-C while it is being imported is one line, too."""
    try:
        from sdd.commands.main import main as run

        return run()
    except KeyboardInterrupt:
        print("sdd: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
