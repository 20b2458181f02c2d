"""What `python -m slm_jax.serve` does: options, loading, warming up, and the server until a signal ends it."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import json
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from slm_jax.cli.options import read_options
from slm_jax.utils.errors import UserError
from slm_jax.utils.process import tune_process


@dataclass(frozen=True)
class Options:
    """Serve the models of runs: the OpenAI form of completions, and a page to try them on.

    Several runs stand side by side on the page.

        python -m slm_jax.serve                            the newest run, on http://localhost:8000
        python -m slm_jax.serve --run runs/A --run runs/B  these
    """

    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run directory; may be given several times; none: the newest in runs/."""
    host: str = "127.0.0.1"
    """The address to listen on; 127.0.0.1: this machine only. 0.0.0.0: all of the network, which wants an api_key."""
    port: int = 8000
    """The port; 0: any free one."""
    api_key: str = ""
    """Requests must bring it (Authorization: Bearer KEY); @FILE: what stands in that file."""
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A name that the server may be called by, beside localhost, this machine's name and addresses."""
    slots: int = 32
    """Texts written at once, of each run."""
    rows: int = 0
    """Of these, how many one program computes together; 0: eight on a CPU, all elsewhere."""
    queue: int = 64
    """Texts that may wait for a slot; beyond that the answer is 429."""
    max_prompt: int = 4096
    """Tokens of the longest prompt."""
    max_tokens: int = 4096
    """Tokens of the longest continuation."""
    max_body: int = 1_000_000
    """Bytes of the longest request."""
    timeout: float = 300.0
    """Seconds that one request may take, waiting included."""
    context: int = 0
    """Tokens that attention looks back over; 0: the length that the model was trained at."""


def check(options: Options) -> None:
    """Raises UserError with all that is wrong."""
    least = {
        "port": 0,
        "slots": 1,
        "rows": 0,
        "queue": 0,
        "max_prompt": 1,
        "max_tokens": 1,
        "max_body": 1,
        "context": 0,
    }
    values = {name: getattr(options, name) for name in least}
    problems = [f"{name} {values[name]} must be {low} or more" for name, low in least.items() if values[name] < low]
    if options.port > 65535:
        problems.append(f"port {options.port} must be 65535 or less")
    if options.max_prompt + options.max_tokens >= 2**31:
        problems.append(
            f"max_prompt {options.max_prompt} and max_tokens {options.max_tokens} must be below 2^31 together"
        )
    if not options.timeout > 0:
        problems.append(f"timeout {options.timeout} must be above 0")
    if problems:
        raise UserError("; ".join(problems))
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} is not installed: pip install 'slm_jax[serve]' (or -e '.[serve]')")


def read_key(option: str) -> str:
    """The API key. Raises UserError if its file cannot be read or is empty, or if no header could bring the key."""
    key = option
    if option.startswith("@"):
        try:
            key = Path(option[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api_key {option}: cannot be read: {error}") from None
        if not key:
            raise UserError(f"--api_key {option}: the file is empty")
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UserError("--api_key: only printable ASCII characters, no space at either end: it travels in a header")
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(args: Sequence[str] | None = None) -> None:
    """The command line. Raises UserError."""
    options = read_options(Options, args, "python -m slm_jax.serve")
    check(options)
    api_key = read_key(options.api_key)
    tune_process()
    from slm_jax.data.prepare import example_prompt
    from slm_jax.run.load import load_run
    from slm_jax.serve.app import Server
    from slm_jax.serve.completions import Limits
    from slm_jax.serve.engine import Engine

    engines: dict[str, Engine] = {}
    for path in options.run or (None,):
        loaded = load_run(path)
        name = _unique(model_name(loaded.run.path.resolve()), engines)
        _say(f"{name}: step {loaded.step}, context {options.context or loaded.context} tokens, {loaded.run.path}")
        engines[name] = Engine(loaded, options.slots, options.queue, options.rows, options.context)
    for name, engine in engines.items():
        seconds = engine.warm_up(lambda text, name=name: _say(f"{name}: {text}"))  # type: ignore[misc]
        _say(f"{name}: {engine.slots} slots, {engine.rows} computed together; ready after {seconds:.1f} s of compiling")
    if not is_loopback(options.host):
        open_to = "with the API key" if api_key else "WITHOUT an API key: give --api_key, or let nobody else reach it"
        _say(f"warning: listening on {options.host}: others on the network can use this server {open_to}")
    limits = Limits(options.max_prompt, options.max_tokens, options.timeout)
    app = Server(engines, limits).application(api_key, [options.host, *options.allow_host], options.max_body)
    name, engine = next(iter(engines.items()))
    _serve(app, options, name, example_prompt(engine.run.run), bool(api_key))


def model_name(path: Path) -> str:
    """A run's name as clients give it; that of a curriculum's stage begins with the curriculum's."""
    return f"{path.parent.parent.name}-{path.name}" if path.parent.name == "stages" else path.name


def _unique(name: str, taken: object) -> str:
    number, found = 2, name
    while found in taken:  # type: ignore[operator]
        found, number = f"{name}-{number}", number + 1
    return found


def _serve(app: Any, options: Options, model: str, prompt: str, keyed: bool) -> None:
    import uvicorn

    config = uvicorn.Config(
        app, options.host, options.port, log_level="warning", access_log=False, lifespan="on", server_header=False,
        timeout_graceful_shutdown=5, timeout_keep_alive=30, h11_max_incomplete_event_size=65536,
    )  # fmt: skip
    listening = _listen(options.host, options.port)
    port = listening.getsockname()[1]
    shown = "localhost" if is_loopback(options.host) or options.host in ("0.0.0.0", "::") else options.host
    _say(f"\nhttp://{shown}:{port}/  (Ctrl-C stops)\n")
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 40, "stream": True}, ensure_ascii=False)
    _say(
        f"curl -N http://{shown}:{port}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """End on SIGINT and SIGTERM, with status 0: uvicorn itself would raise the signal again."""
            before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for each, handler in before.items():
                    signal.signal(each, handler)

    clock = time.perf_counter()
    asyncio.run(Server(config).serve([listening]))
    _say(f"stopped after {time.perf_counter() - clock:.0f} s")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; --port 0 takes a free one"
        ) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
