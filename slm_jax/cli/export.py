"""The command `python -m slm_jax.export`."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slm_jax.cli.options import read_options
from slm_jax.huggingface.export import export
from slm_jax.run.load import load_run
from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Options:
    """Write the model of a run as a folder that Hugging Face transformers loads.

    Weights as safetensors, config.json of a stock class (Qwen3, Mistral or Llama, whichever has the model's options),
    the tokenizer as a module with its vocabulary, and a model card from the run's own figures. The way back is
    `python -m slm_jax.train --init.from_hf DIR`.
    """

    to: str
    """The folder to write; it must not hold anything."""
    run: str = ""
    """The run directory; empty: the newest in runs/."""
    average: int = 1
    """Average the parameters of the newest so many checkpoints, instead of the newest alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the files; bfloat16 halves them and keeps 8 bits of each number's digits."""
    license: str = ""
    """The model's licence, as the hub spells it (mit, apache-2.0, cc-by-4.0 …), for the card; empty: none is named."""
    name: str = ""
    """The model's name on the card; empty: that of the run."""
    shard_gb: float = 5.0
    """Weights of more than so many 10^9 bytes are split into several files."""
    overwrite: bool = False
    """Replace a folder that an export wrote before."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line. Raises UserError."""
    options = read_options(Options, args, "python -m slm_jax.export")
    if options.average < 1:
        raise UserError(f"average {options.average} must be 1 or more")
    loaded = load_run(options.run or None, options.average)
    given = {key: value for key, value in vars(options).items() if key not in ("to", "run")}
    folder = export(loaded, options.to, **given)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    size = sum(path.stat().st_size for path in folder.iterdir())
    place = shlex.quote(str(folder))
    print(f"{loaded.run.path}, step {loaded.step:,}, as {kind} in {options.dtype}: {size / 1e6:,.1f} MB in {folder}\n")
    print(f"  AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    print(f"  AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)\n")
    print(f"To the hub:\n  hf upload USER/{shlex.quote(loaded.run.path.absolute().name)} {place}")
