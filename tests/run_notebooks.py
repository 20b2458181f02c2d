"""Execute the notebooks: python tests/run_notebooks.py [NAME] [--store] (needs the extra `dev`).

By default at tiny size: a cell that overrides the parameters with small values is inserted after the cell tagged
"parameters". With `--store` at full size, on a CPU in some ten minutes, and the outputs are stored in the notebooks.
"""

import argparse
import os
import re
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
VOCAB_SIZE, STEPS, BATCH_SIZES, WIDTHS = 600, 2, (2, 4), (32, 64)
"""


def main() -> None:
    """Run each notebook in a temporary folder; the first error ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="*", help="notebook without .ipynb, or a pattern (default: all)")
    parser.add_argument("--store", action="store_true", help="run at full size and store the outputs in the notebooks")
    options = parser.parse_args()
    paths = sorted(NOTEBOOKS.glob(f"{options.name}.ipynb"))
    if not paths:
        raise SystemExit(f"no such notebook in {NOTEBOOKS}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")])
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        if not options.store:
            notebook.cells.insert(parameters_cell(notebook) + 1, nbformat.v4.new_code_cell(TINY_PARAMETERS))
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=3600, resources=resources, record_timing=False).execute()
        print(f"{path.name}: {len(notebook.cells)} cells", file=sys.stderr)
        if options.store:
            tidy(notebook, folder)
            nbformat.write(notebook, path)


def parameters_cell(notebook: nbformat.NotebookNode) -> int:
    """Return the index of the cell tagged "parameters"."""
    tags = [cell.metadata.get("tags", ()) for cell in notebook.cells]
    return next(i for i, cell_tags in enumerate(tags) if "parameters" in cell_tags)


def tidy(notebook: nbformat.NotebookNode, folder: str) -> None:
    """Remove what differs between machines from stored outputs: absolute paths, and the version of Python."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell["outputs"] = merged_streams(cell["outputs"])
        for output in cell["outputs"]:
            if output.output_type == "stream":
                output.text = re.sub(rf"(/private)?{re.escape(folder)}/?", "", output.text)


def merged_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return the outputs of a cell with neighboring pieces of one stream joined."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        is_continued = last is not None and output.output_type == "stream" and last.get("name") == output.get("name")
        if is_continued:
            last.text += output.text
        else:
            merged.append(output)
    return merged


if __name__ == "__main__":
    main()
