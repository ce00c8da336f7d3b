"""`python -m lit_alignment` is the command `lit-alignment`."""

import sys

from lit_alignment.cli import main

sys.exit(main())
