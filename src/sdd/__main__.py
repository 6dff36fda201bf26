"""`python -m sdd` is the `sdd` command."""

import sys

from sdd.commands.main import main

sys.exit(main())
