"""``python -m vtx.cli`` is ``vtx``."""

import sys

from vtx.cli.main import main

sys.exit(main())
