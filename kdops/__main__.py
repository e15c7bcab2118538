"""``python -m kdops``: the command line. See kdops/cli.py."""

import sys

from kdops.cli import main

sys.exit(main())
