"""The report is tested on the sweeps that the pictures are tested on."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "pictures"))
