"""What the files of a sweep are called."""

from __future__ import annotations

RESULT, TABLE, RECIPE, REPORT, PICTURES = "sweep.json", "sweep.csv", "recipe.yaml", "report.html", "pictures"
