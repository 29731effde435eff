"""`python -m fused_kd` is `fused-kd`."""

import sys

from fused_kd.cli import main

sys.exit(main())
