"""Fixtures: a tiny model with its tokenizer, an engine over it, and a real server on a loopback port."""

import contextlib
import json
import threading
from dataclasses import dataclass

import jax
import pytest
from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.model.abstract import abstract_model
from slm_jax.model.params import is_matrix
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun
from slm_jax.serve.engine import Engine
from tests.helpers import tiny_config
from tokenizer import HybridTokenizer

TEXT = "The list is a Sequence. It returns the value of the first item, or None.\n    Naïve café: שלום! " * 20
CONTEXT = 128
KEY = "a secret"


def loaded_run(path, tokenizer: HybridTokenizer, seed: int = 0, dtype: str = "float32", depth: int = 1) -> LoadedRun:
    """Return a run of an untrained model, with weights scaled up so that its predictions differ clearly."""
    config: Config = tiny_config(
        train__sequence_length=CONTEXT, model__depth=depth, train__seed=seed, train__dtype=dtype
    )
    graph, shapes = abstract_model(config, tokenizer.vocab_size)
    keys = iter(jax.random.split(jax.random.key(seed), 99))

    def fill(path, shape):
        if is_matrix(path, shape):
            return jax.random.normal(next(keys), shape.shape) * 0.1
        return jax.numpy.ones(shape.shape)

    params = jax.tree_util.tree_map_with_path(fill, shapes)
    path.mkdir()
    run = Run(path)
    run.save_config(config)
    rows = [{"step": i + 1, "loss": 5 - i / 100, "lr": 0.01} for i in range(300)]
    rows[-1] |= {"val_loss": 2.5, "val_bits_per_byte": 1.25}
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LoadedRun(run, config, tokenizer, nnx.merge(graph, params), 300)


@pytest.fixture(scope="session")
def tokenizer():
    """Tokenizer learned from a few lines."""
    tokenizer = HybridTokenizer()
    tokenizer.add_text(TEXT)
    tokenizer.freeze_vocab(vocab_size=400)
    return tokenizer


@pytest.fixture(scope="session")
def loaded(tmp_path_factory, tokenizer):
    """A run to be served."""
    return loaded_run(tmp_path_factory.mktemp("runs") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def engine(loaded):
    """Engine of four slots in blocks of two, not started."""
    return Engine(loaded, slots=4, queue_size=6, block_slots=2)


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    engines: dict[str, Engine]
    app: object


@contextlib.contextmanager
def serve(engines, limits, max_body=10_000, folders=()):
    """Serve engines on a free port; `folders` are those whose runs the page shows."""
    uvicorn = pytest.importorskip("uvicorn")
    from slm_jax.serve.app import Server

    server = Server(engines, limits, folders=folders)
    config = uvicorn.Config(server.application("", [], max_body), "127.0.0.1", 0, log_level="error", lifespan="on")
    running = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.listen()  # clients that connect before it runs wait
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", engines, server)
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def served(loaded, tokenizer, tmp_path_factory):
    """Server of two runs on a free port."""
    pytest.importorskip("starlette")
    from slm_jax.serve.completions import Limits

    other = loaded_run(tmp_path_factory.mktemp("runs") / "other", tokenizer, seed=1)
    runs = {"tiny": loaded, "other": other}
    engines = {name: Engine(run, slots=4, queue_size=6, block_slots=2) for name, run in runs.items()}
    with serve(engines, Limits(prompt_tokens=300, max_tokens=100_000, seconds=60)) as served:
        yield served


@pytest.fixture
def client(served):
    """OpenAI's client, without retries."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client
