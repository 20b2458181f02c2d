"""Names of files and folders used by several layers."""

from pathlib import Path

RUNS = Path("runs")
STAGES = "stages"  # the folder of a curriculum that holds one run per stage
CURRICULUM = "curriculum.toml"
