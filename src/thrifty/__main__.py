"""`python -m thrifty` is the command `thrifty`."""

import sys

from thrifty.cli import main

sys.exit(main())
