"""`python -m twinax` is `twinax`."""

import sys

from .cli import main

sys.exit(main())
