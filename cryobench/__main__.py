"""``python -m cryobench`` is the same as ``cryobench``."""

import sys

from cryobench.cli import main

sys.exit(main())
