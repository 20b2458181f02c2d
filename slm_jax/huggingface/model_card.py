"""README.md of an exported model: what the run's own files say of it, and nothing else."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.config.schema import Config
from slm_jax.data.corpus.corpus import read_manifest
from slm_jax.performance import flops
from slm_jax.run.directory import Run
from slm_jax.run.metrics import Row, read_rows
from slm_jax.utils.errors import UserError


class Weights(NamedTuple):
    """What was exported."""

    step: int
    average: int  # of so many checkpoints they are the mean
    architecture: str
    vocab_size: int


@dataclass(frozen=True)
class Facts:
    """What the card is made of."""

    name: str
    license: str
    config: Config
    weights: Weights
    rows: Sequence[Row]  # of the steps that the weights have behind them
    manifests: Sequence[dict[str, Any]]  # of the text, one for each source
    results: Sequence[dict[str, Any]]  # of evaluation.json
    sample: str  # a text that the model wrote in training


def gather(run: Run, config: Config, weights: Weights, name: str, license: str) -> Facts:
    """The facts of a run; of what a run does not have, none."""
    rows = [row for row in read_rows(run.metrics) if row["step"] <= weights.step]
    return Facts(name, license, config, weights, rows, _manifests(run), _results(run), _sample(run, weights.step))


def _manifests(run: Run) -> list[dict[str, Any]]:
    try:
        whole = read_manifest(run.corpus)
        return [read_manifest(run.corpus / each["folder"]) for each in whole["mix"]] if "mix" in whole else [whole]
    except UserError:  # a run that was copied without its text
        return []


def _results(run: Run) -> list[dict[str, Any]]:
    path = run.path / "evaluation.json"
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["results"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: measure again with python -m slm_jax.evaluate, or remove it") from None


def _sample(run: Run, step: int) -> str:
    """The text that was written at the last validation up to a step, without its indentation."""
    if not run.samples.is_file():
        return ""
    sections = run.samples.read_text(encoding="utf-8", errors="replace").split("\n## Step ")[1:]
    before = [text for number, _, text in (each.partition("\n") for each in sections) if int(number) <= step]
    text = before[-1].partition("\n* * *\n")[0] if before else ""
    return "\n".join(line.removeprefix("    ") for line in text.strip("\n").splitlines()[:20])


def write_card(facts: Facts) -> str:
    """README.md, with the header that the hub reads."""
    return "\n".join([*_header(facts), *_introduction(facts), *_usage(facts), *_training(facts), *_measured(facts)])


def _header(facts: Facts) -> Iterator[str]:
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    if facts.license:
        yield f"license: {json.dumps(facts.license)}"
    yield "tags:\n- slm_jax\n- jax"
    hub = sorted({each["source"][1] for each in facts.manifests if _is_hub(each)})
    if hub:
        yield "\n".join(["datasets:", *(f"- {json.dumps(name)}" for name in hub)])
    yield "---\n"


def _is_hub(manifest: dict[str, Any]) -> bool:
    source = manifest["source"]
    return isinstance(source, list) and len(source) > 1 and source[0] == "hub"


def _introduction(facts: Facts) -> Iterator[str]:
    model, count = facts.config.model, flops.parameters(facts.config.model, facts.weights.vocab_size)
    heads = f"{model.heads} heads" + (f" ({model.kv_heads} for keys and values)" if model.kv_heads else "")
    seen = f"a window of {model.window} tokens" if model.window else "all tokens before"
    yield f"# {facts.name}\n"
    tied = "tied" if model.tie_weights else "untied"
    yield (
        f"A language model of {count / 1e6:,.2f} M parameters, trained with slm_jax and written as "
        f"`{facts.weights.architecture}`: {model.depth} layers of width {model.dim}, {heads}, attention to {seen}, a "
        f"vocabulary of {facts.weights.vocab_size:,} ids, {tied} embeddings. It was trained on sequences of "
        f"{facts.config.train.sequence_length:,} tokens and never saw a longer one.\n"
    )


def _usage(facts: Facts) -> Iterator[str]:
    yield f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

The model is a stock class of `transformers`. The tokenizer is not: `trust_remote_code` runs `tokenization_slm_jax.py`
of this folder (pure Python and NumPy; the vocabulary, `tokenizer.hybtok`, is data). It gives the very ids that the
model was trained with, for any text. A text begins with `<EOS>`, as a document did in training;
`add_special_tokens=False` leaves that out, and then `decode(encode(s)) == s` for every string. Special tokens cannot be
written in a text.
`generation_config.json` holds the settings that slm_jax generates with; `do_sample=False` takes the likeliest token.
Up to {facts.config.train.sequence_length:,} tokens, prompt included, are what it was trained for.
"""


def _training(facts: Facts) -> Iterator[str]:
    config, rows = facts.config, facts.rows
    train, optimizer = config.train, config.optimizer
    yield "## Training\n"
    if start := config.init.from_run or config.init.from_hf:
        yield f"- Began with the weights of `{Path(start).absolute().name}`; what follows came after."
    for each in facts.manifests:
        name = f"`{each['source'][1]}`" if _is_hub(each) else _source_name(each)
        side = each["train"]
        yield (
            f"- Text: {name}, {side['documents']:,} documents, {side['tokens']:,} tokens, {side['bytes'] / 1e6:,.2f} MB"
            f"; {each['validation']['bytes'] / 1e6:,.2f} MB held out."
            + (f" Prompts by the template {_template(each, config)!r}." if side["prompts"] else "")
        )
    tokens = f", {sum(row['tokens'] for row in rows):,} predicted tokens" if rows else ""
    shape = f"{train.batch_size} x {train.sequence_length} tokens ({config.data.mode})"
    yield (
        f"- {facts.weights.step:,} steps of {shape}{tokens}"
        + (f", {rows[-1]['seconds'] / 60:,.1f} minutes." if rows else ".")
    )
    name = {"muon": "Muon for hidden matrices and AdamW for the rest", "adamw": "AdamW"}[optimizer.name]
    yield (
        f"- {name}, peak learning rate {optimizer.lr:g}, {optimizer.warmup_steps} steps of warm-up, schedule "
        f"{optimizer.schedule}, weight decay {optimizer.weight_decay:g}, dropout {config.model.dropout:g}."
    )
    weights = {"z-loss": train.z_loss, "unlikelihood of repetition": train.ul_alpha}
    if terms := [f"{what} {value:g}" for what, value in weights.items() if value]:
        yield f"- Beside the cross entropy: {', '.join(terms)}."
    yield ""


def _source_name(manifest: dict[str, Any]) -> str:
    """Without the names of a user's files, which are nobody's business."""
    ours = {"python-docs": "the documentation", "python-qa": "questions about the functions"}
    name = ours.get(manifest["name"])
    return f"{name} inside Python {manifest['version']}" if name else "text files"


def _template(manifest: dict[str, Any], config: Config) -> str:
    """By which columns became prompts; see `describe` of the sources for where it stands."""
    source = manifest["source"]
    given = source[6] if _is_hub(manifest) else source[3] if manifest["name"] == "python-qa" else ""
    return config.data.template or given


_VALIDATION = {
    "val_loss": ("loss", ".4f"),
    "val_perplexity": ("perplexity", ".2f"),
    "val_bits_per_byte": ("bits per byte", ".4f"),
    "val_accuracy": ("next-token accuracy", ".1%"),
}


def _measured(facts: Facts) -> Iterator[str]:
    validated = [row for row in facts.rows if row.get("val_loss") is not None]
    if validated or facts.results:
        yield "## Measured\n"
    if facts.weights.average > 1:
        yield (
            f"The weights are the mean of those of the newest {facts.weights.average} checkpoints, "
            "the figures of held-out text those of the newest alone.\n"
        )
    if validated:
        row = validated[-1]
        numbers = ", ".join(f"{what} {row[key]:{form}}" for key, (what, form) in _VALIDATION.items() if key in row)
        yield f"Held-out text, step {row['step']:,}: {numbers}.\n"
    if facts.results:
        yield "| task | group | metric | value | 95 % interval | count | step |\n|---|---|---|---|---|---|---|"
        for each in facts.results:
            yield "| " + " | ".join(_cells(each)) + " |"
        yield ""
    if facts.sample:
        fence = "`" * 8
        yield f"## A text that it wrote in training\n\n{fence}\n{facts.sample.replace(fence, '')}\n{fence}\n"


def _cells(result: dict[str, Any]) -> Iterator[str]:
    def number(key: str) -> str:
        value = result.get(key)
        return f"{value:#.4g}".removesuffix(".") if isinstance(value, int | float) else ""

    interval = f"{number('low')} to {number('high')}" if number("low") and number("high") else ""
    texts = (str(result.get("task", "")), str(result.get("group") or ""), str(result.get("metric", "")))
    more = (number("value"), interval, str(result.get("count") or ""), str(result.get("step") or ""))
    return (text.replace("|", "\\|").replace("\n", " ") for text in (*texts, *more))
