"""Execute the notebooks at tiny size: python tests/run_notebooks.py [NAME] (needs the extra `dev`).

A cell that overrides the parameters with small values is inserted after the cell tagged "parameters".
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TINY_PARAMETERS = """
OVERRIDES = {
    "train.steps": 4, "train.batch_size": 4, "train.sequence_length": 32, "model.dim": 32, "model.heads": 2,
    "model.depth": 1, "model.mlp_dim": 64, "tokenizer.vocab_size": 400, "eval.max_tokens": 1000,
}
VOCAB_SIZE, STEPS = 600, 2
"""


def main() -> None:
    """Run each notebook in a temporary folder; the first error ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="*", help="notebook without .ipynb, or a pattern (default: all)")
    paths = sorted(NOTEBOOKS.glob(f"{parser.parse_args().name}.ipynb"))
    if not paths:
        raise SystemExit(f"no such notebook in {NOTEBOOKS}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        tags = [cell.metadata.get("tags", ()) for cell in notebook.cells]
        position = next(i for i, cell_tags in enumerate(tags) if "parameters" in cell_tags)
        notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(TINY_PARAMETERS))
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
        print(f"{path.name}: {len(notebook.cells)} cells", file=sys.stderr)


if __name__ == "__main__":
    main()
