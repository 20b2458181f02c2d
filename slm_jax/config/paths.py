"""Names of files and folders that several layers use."""

from pathlib import Path

RUNS = Path("runs")
STAGES = "stages"  # the folder of a curriculum that holds one run per stage
CURRICULUM = "curriculum.toml"
