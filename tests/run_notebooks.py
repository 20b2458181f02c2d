"""Execute every notebook at tiny size: `python tests/run_notebooks.py [NAME]` (needs the extra `dev`).

The cell tagged "parameters" is followed by one that makes everything small.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TINY = """
OVERRIDES = {
    "train.steps": 4, "train.batch_size": 4, "train.sequence_length": 32, "model.dim": 32, "model.heads": 2,
    "model.depth": 1, "model.mlp_dim": 64, "tokenizer.vocab_size": 400, "eval.max_tokens": 1000,
}
VOCAB_SIZE, STEPS = 600, 2
"""


def main() -> None:
    """Run them in a folder of their own; the first failure ends it with the cell's error."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    wanted = sys.argv[1] if sys.argv[1:] else "*"
    for path in sorted((Path(__file__).parent.parent / "notebooks").glob(f"{wanted}.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(TINY))
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
        print(f"{path.name}: {len(notebook.cells)} cells", file=sys.stderr)


if __name__ == "__main__":
    main()
