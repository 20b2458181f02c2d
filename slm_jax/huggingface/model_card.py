"""Model card (README.md) of an exported model, made from the run's own files only."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.config.schema import Config
from slm_jax.data.corpus.corpus import read_manifest
from slm_jax.performance import flops
from slm_jax.run.directory import Run
from slm_jax.run.metrics import Row, read_metrics
from slm_jax.run.results import read_evaluation
from slm_jax.run.samples import read_samples
from slm_jax.utils.errors import UserError

_SAMPLE_LINES = 20  # maximum length of the sample on the card


class ExportedWeights(NamedTuple):
    """Facts about the exported weights.

    Attributes:
        step: The training step they are from.
        average: Number of checkpoints they are the mean of.
        architecture: Class of transformers.
        vocab_size: Number of ids.
        foreign_tokenizer: The tokenizer is that of a published model.
        portable: Whether the tokenizer is a stock ``tokenizer.json``.
        chat: Whether the folder has a chat template.
    """

    step: int
    average: int
    architecture: str
    vocab_size: int
    foreign_tokenizer: bool = False
    portable: bool = False
    chat: bool = False


@dataclass(frozen=True)
class CardData:
    """Content of a model card.

    Attributes:
        name: The model's name.
        license: Its license; empty: none is stated.
        config: Config of the run.
        weights: Facts about the exported weights.
        rows: Rows of metrics.jsonl up to the exported step.
        manifests: Manifests of the training text, one per source.
        results: Results of evaluation.json.
        sample: A text generated during training; may be empty.
    """

    name: str
    license: str
    config: Config
    weights: ExportedWeights
    rows: Sequence[Row]
    manifests: Sequence[dict[str, Any]]
    results: Sequence[dict[str, Any]]
    sample: str


def collect(run: Run, config: Config, weights: ExportedWeights, name: str, license: str) -> CardData:
    """Collect the content of a card from a run directory; files that the run does not have are skipped.

    Args:
        run: The run directory.
        config: Its config.
        weights: Facts about the exported weights.
        name: The model's name.
        license: Its license; empty: none is stated.

    Raises:
        UserError: A file of the run is damaged.
    """
    rows = [row for row in read_metrics(run.metrics) if row["step"] <= weights.step]
    return CardData(
        name=name,
        license=license,
        config=config,
        weights=weights,
        rows=rows,
        manifests=_manifests(run),
        results=read_evaluation(run.path).results,
        sample=_sample(run, weights.step),
    )


def _manifests(run: Run) -> list[dict[str, Any]]:
    try:
        manifest = read_manifest(run.corpus)
        if "mix" in manifest:
            return [read_manifest(run.corpus / source["folder"]) for source in manifest["mix"]]
        return [manifest]
    except UserError:  # the run was copied without its corpus
        return []


def _sample(run: Run, step: int) -> str:
    """Return the first sample of the last validation up to a step, at most `_SAMPLE_LINES` lines of it."""
    before = [sample for sample in read_samples(run.samples) if sample.step <= step]
    return "\n".join(before[-1].texts[0].splitlines()[:_SAMPLE_LINES]) if before else ""


def write_card(data: CardData) -> str:
    """Return the text of README.md, with the metadata that the hub reads."""
    sections = (_metadata(data), _introduction(data), _usage(data), _training(data), _evaluation(data))
    return "\n".join(line for section in sections for line in section)


def _metadata(data: CardData) -> Iterator[str]:
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    if data.license:
        yield f"license: {json.dumps(data.license)}"
    yield "tags:\n- slm_jax\n- jax"
    hub_names = sorted({manifest["source"][1] for manifest in data.manifests if _is_from_hub(manifest)})
    if hub_names:
        yield "\n".join(["datasets:", *(f"- {json.dumps(name)}" for name in hub_names)])
    yield "---\n"


def _is_from_hub(manifest: dict[str, Any]) -> bool:
    source = manifest["source"]
    return isinstance(source, list) and len(source) > 1 and source[0] == "hub"


def _introduction(data: CardData) -> Iterator[str]:
    model = data.config.model
    count = flops.parameters(model, data.weights.vocab_size)
    heads = f"{model.heads} heads"
    if model.kv_heads:
        heads += f" ({model.kv_heads} key/value heads)"
    attention = f"sliding-window attention over {model.window} tokens" if model.window else "full causal attention"
    if model.window and not all(model.layer_windows):
        attention += f" in {sum(map(bool, model.layer_windows))} of them"
    tied = "tied" if model.tie_weights else "untied"
    yield f"# {data.name}\n"
    yield (
        f"A language model with {count / 1e6:,.2f} M parameters, trained with slm_jax and exported as "
        f"`{data.weights.architecture}`: {model.depth} layers of width {model.dim}, {heads}, {attention}, a vocabulary "
        f"of {data.weights.vocab_size:,} ids, {tied} embeddings. It was trained on sequences of "
        f"{data.config.train.sequence_length:,} tokens.\n"
    )


_TOKENIZER = """\
The model is a stock class of `transformers`. The tokenizer is not: `trust_remote_code` runs `tokenization_slm_jax.py`
from this folder (pure Python and NumPy; the vocabulary, `tokenizer.hybtok`, is data). For any text it gives exactly the
ids that the model was trained with."""
_PORTABLE_TOKENIZER = """\
Model and tokenizer are stock classes of `transformers`; no code of this folder is run. `tokenizer.json` gives the ids
that the model was trained with; `tokenizer.hybtok` is the same vocabulary for slm_jax."""
_USAGE_OF_STOCK_FILES = """## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

The model is a stock class of `transformers`. The tokenizer's files, with its special tokens and chat template, are
those of the model that training started from.
"""


def _usage(data: CardData) -> Iterator[str]:
    if data.weights.foreign_tokenizer:
        yield _USAGE_OF_STOCK_FILES
        return
    portable = data.weights.portable
    strings = "every string without lone surrogates" if portable else "every string"
    special = "No text\ncan produce a special token."
    if data.weights.chat:
        special = (
            "The chat\ntemplate (`tokenizer.apply_chat_template`) gives the ids of training, and no message can "
            "produce a special token."
        )
        if portable:
            special += " Elsewhere\nthis needs `split_special_tokens=True`."
    yield f"""## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained({"folder" if portable else "folder, trust_remote_code=True"})
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

{_PORTABLE_TOKENIZER if portable else _TOKENIZER} A text starts with `<EOS>`, as documents did in training; with
`add_special_tokens=False` it does not, and then `decode(encode(s)) == s` for {strings}. {special}
`generation_config.json` holds the default sampling settings of slm_jax; `do_sample=False` decodes greedily.
The model was trained for at most {data.config.train.sequence_length:,} tokens, prompt included.
"""


def _training(data: CardData) -> Iterator[str]:
    config = data.config
    rows = data.rows
    train = config.train
    optimizer = config.optimizer
    yield "## Training\n"
    if initial := config.init.from_run or config.init.from_hf:
        yield f"- Initialized from the weights of `{Path(initial).absolute().name}`, then trained as follows."
    yield from (_text_line(manifest, config) for manifest in data.manifests)
    steps = f"- {data.weights.step:,} steps of {train.batch_size} x {train.sequence_length} tokens ({config.data.mode})"
    if rows:
        steps += f", {sum(row['tokens'] for row in rows):,} predicted tokens, {rows[-1]['seconds'] / 60:,.1f} minutes"
    yield f"{steps}."
    matrices = {"muon": "Muon", "normuon": "NorMuon"}.get(optimizer.name)
    optimizer_name = f"{matrices} for hidden matrices, AdamW for the rest" if matrices else "AdamW"
    yield (
        f"- Optimizer: {optimizer_name}; peak learning rate {optimizer.lr:g}, {optimizer.warmup_steps} warmup steps, "
        f"schedule {optimizer.schedule}, weight decay {optimizer.weight_decay:g}, dropout {config.model.dropout:g}."
    )
    if optimizer.average_decay:
        yield f"- The weights are a moving average over the steps, with decay {optimizer.average_decay:g}."
    if train.objective == "dpo":
        yield f"- Loss: preferences (DPO), beta {train.dpo_beta:g}, with the initial weights as reference."
    loss_weights = {"z-loss": train.z_loss, "unlikelihood of repetition": train.ul_alpha}
    if terms := [f"{name} {weight:g}" for name, weight in loss_weights.items() if weight]:
        yield f"- Loss: cross-entropy plus {', '.join(terms)}."
    yield ""


def _text_line(manifest: dict[str, Any], config: Config) -> str:
    """Return a line about one source of the training text."""
    name = f"`{manifest['source'][1]}`" if _is_from_hub(manifest) else _source_name(manifest)
    train = manifest["train"]
    line = (
        f"- Text: {name}, {train['documents']:,} documents, {train['tokens']:,} tokens, {train['bytes'] / 1e6:,.2f} MB"
        f"; {manifest['validation']['bytes'] / 1e6:,.2f} MB held out for validation."
    )
    if train["prompts"]:
        line += f" Prompts with the template {_template(manifest, config)!r}."
    return line


def _source_name(manifest: dict[str, Any]) -> str:
    """Return a description of a source; names of the user's files are private and left out."""
    built_in = {
        "python-docs": "the documentation",
        "python-qa": "questions about the functions",
        "python-chat": "conversations about the standard library",
    }
    name = built_in.get(manifest["name"])
    return f"{name} of Python {manifest['version']}" if name else "text files"


def _template(manifest: dict[str, Any], config: Config) -> str:
    """Return the prompt template: that of the config, else the default of the source."""
    source = manifest["source"]
    if config.data.template:
        return config.data.template
    # Positions in the list that the sources' `describe` writes to the manifest.
    if _is_from_hub(manifest):
        return source[6]
    return source[3] if manifest["name"] == "python-qa" else ""


_VALIDATION = {
    "val_loss": ("loss", ".4f"),
    "val_perplexity": ("perplexity", ".2f"),
    "val_bits_per_byte": ("bits per byte", ".4f"),
    "val_accuracy": ("next-token accuracy", ".1%"),
}
_PREFERENCES = {
    "val_accuracy": ("pairs whose chosen response is preferred", ".1%"),
    "val_loss": ("loss per pair", ".4f"),
    "val_perplexity": ("perplexity of the chosen responses", ".2f"),
    "val_bits_per_byte": ("their bits per byte", ".4f"),
}


def _evaluation(data: CardData) -> Iterator[str]:
    validated = [row for row in data.rows if row.get("val_loss") is not None]
    if validated or data.results:
        yield "## Evaluation\n"
    if data.weights.average > 1:
        yield (
            f"The weights are the mean of the newest {data.weights.average} checkpoints; the validation scores are "
            "those of the newest checkpoint alone.\n"
        )
    if validated:
        row = validated[-1]
        is_dpo = data.config.train.objective == "dpo"
        labels = _PREFERENCES if is_dpo else _VALIDATION
        scores = ", ".join(f"{name} {row[key]:{form}}" for key, (name, form) in labels.items() if key in row)
        yield f"{'Held-out pairs' if is_dpo else 'Validation text'}, step {row['step']:,}: {scores}.\n"
    # A group is FIELD / PHENOMENON / PARADIGM; BLiMP has 67 of the last, and the mean over all in the group "all".
    details = [result for result in data.results if str(result.get("group") or "").count(" / ") >= 2]
    yield from _table([result for result in data.results if result not in details])
    if details:
        yield f"<details>\n<summary>All {len(details)} paradigms</summary>\n"
        yield from _table(details)
        yield "</details>\n"
    if data.sample:
        fence = "`" * 8
        yield f"## Sample\n\nGenerated during training:\n\n{fence}\n{data.sample.replace(fence, '')}\n{fence}\n"


def _table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of results; nothing without any."""
    if not results:
        return
    yield "| task | group | metric | value | 95 % interval | count | step |\n|---|---|---|---|---|---|---|"
    for result in results:
        yield "| " + " | ".join(_cells(result)) + " |"
    yield ""


def _cells(result: dict[str, Any]) -> list[str]:
    """Return the cells of one row of the results table."""

    def number(key: str) -> str:
        value = result.get(key)
        return f"{value:#.4g}".removesuffix(".") if isinstance(value, int | float) else ""

    interval = f"{number('low')} to {number('high')}" if number("low") and number("high") else ""
    cells = [
        str(result.get("task", "")),
        str(result.get("group") or ""),
        str(result.get("metric", "")),
        number("value"),
        interval,
        str(result.get("count") or ""),
        str(result.get("step") or ""),
    ]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
