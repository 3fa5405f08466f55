"""`python -m megatsp` is the command `megatsp`."""

import sys

from megatsp.cli import main

sys.exit(main())
