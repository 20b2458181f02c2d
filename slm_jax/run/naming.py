"""Names of new runs: short, and different for runs that start at the same time."""

import contextlib
import itertools
import time
from collections.abc import Iterator

from slm_jax.config.paths import RUNS
from slm_jax.config.schema import Config
from slm_jax.run.directory import UNUSED, Run
from slm_jax.utils.errors import UserError
from slm_jax.utils.labels import file_name_part, source_labels


def new_run(config: Config) -> Run:
    """Create an empty directory `runs/TEXT-SIZE-MMDD` for a run, such as `runs/plays-3m-1127`.

    TEXT is the name of the source, file or folder, or `mix`; SIZE the approximate number of parameters; MMDD the date.
    If there is such a directory, the name ends with -2, -3, … Creating a directory is atomic, so that of several
    processes each gets its own.

    Args:
        config: The config of the run.

    Raises:
        UserError: The directory cannot be created.
    """
    name = f"{_text_name(config)}-{_size_name(config)}-{time.strftime('%m%d')}"
    for number in itertools.count(1):
        run = Run(RUNS / (name if number == 1 else f"{name}-{number}"))
        try:
            RUNS.mkdir(parents=True, exist_ok=True)
            run.path.mkdir()
            (run.path / UNUSED).touch()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot create {run.path}: {error.strerror}. Use another folder: --run DIR") from None
        return run
    raise AssertionError("unreachable")


@contextlib.contextmanager
def removed_if_unused(run: Run) -> Iterator[None]:
    """Remove a directory that `new_run` has created when the block ends, unless a run has begun in it."""
    try:
        yield
    finally:
        if not run.exists() and (run.path / UNUSED).exists():
            with contextlib.suppress(OSError):  # it holds other files
                for name in (UNUSED, ".lock"):
                    (run.path / name).unlink(missing_ok=True)
                run.path.rmdir()


def _text_name(config: Config) -> str:
    """Return a name of a config's text for the name of a run."""
    data = config.data
    if data.mix:
        return "mix"
    if data.source != "files":
        return file_name_part(data.source.removeprefix("hf:").rpartition("/")[2])
    label = source_labels(data.files[:1])[0]
    return file_name_part(label.partition(".")[0] or label)


def _size_name(config: Config) -> str:
    """Return about how many parameters a config's model has, as `850k`, `3m` or `1b`; the vocabulary is an estimate."""
    model = config.model
    inner = -(-2 * model.mlp_dim // (3 * model.mlp_multiple)) * model.mlp_multiple  # as `block.swiglu_width`
    mlp = 3 * inner if model.mlp == "swiglu" else 2 * model.mlp_dim
    q_dim = model.heads * model.head_width
    kv_dim = (model.kv_heads or model.heads) * model.head_width
    tables = (1 if model.tie_weights else 2) * model.dim + len(model.value_embeddings) * kv_dim
    count = model.depth * model.dim * (2 * q_dim + 2 * kv_dim + mlp) + tables * config.tokenizer.vocab_size
    for unit, size in (("b", 1e9), ("m", 1e6)):
        if count >= 0.9995 * size:  # 999,600 are 1m, not 1000k
            return f"{count / size:.0f}{unit}"
    return f"{max(1, round(count / 1e3))}k"
