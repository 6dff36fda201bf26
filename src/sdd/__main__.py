"""`python -m sdd` is the `sdd` command."""

import sys

from sdd.cli import main

sys.exit(main())
