"""The command `python -m slm_jax.serve`: load runs and serve them over HTTP until a signal, compiling meanwhile."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import json
import logging
import os
import shlex
import signal
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from slm_jax.cli import bare_words
from slm_jax.cli.options import Flag, read_options
from slm_jax.config.paths import RUNS
from slm_jax.run.directory import first_readable
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import install_command
from slm_jax.utils.process import tune_process, without_garbage_collection
from slm_jax.utils.progress import show_log

logger = logging.getLogger(__name__)


_MAX_SLOTS = 16_384  # each has memory of its own before the first request


@dataclass(frozen=True)
class Options:
    """Serve the models of runs: OpenAI's completions and chat APIs, and a web page to try them.

    The page shows several runs side by side.

        python -m slm_jax.serve                            the newest run, on http://localhost:8000
        python -m slm_jax.serve --run runs/A --run runs/B  two runs
        python -m slm_jax.serve runs/                      the newest run of a folder; the page shows all of them
    """

    run: Annotated[tuple[str, ...], Flag(metavar="PATH", repeated=True, bare=bare_words.run_folders())] = ()
    """A run directory, or a folder of runs (may be repeated); none: the newest in runs/, whose runs the page shows."""
    step: Annotated[str, Flag(metavar="best|last|N")] = ""
    """The checkpoint of each run; empty: the best if the validation does not improve any more, otherwise the last."""
    follow: bool = False
    """Load new checkpoints of the served runs as training saves them; without it, the page offers them."""
    host: str = "127.0.0.1"
    """The address to listen on; 127.0.0.1: this machine only; 0.0.0.0: the network, with api_key or allow_no_key."""
    port: int = 8000
    """The port; 0: any free one."""
    api_key: str = ""
    """Require this key (Authorization: Bearer KEY); @FILE: read it from a file."""
    allow_no_key: bool = False
    """Listen on the network without an API key: everybody who reaches the port can use the server."""
    allow_host: Annotated[tuple[str, ...], Flag(repeated=True)] = ()
    """Another name that the server is reached by, besides localhost, this machine's name and IP addresses."""
    slots: int = 32
    """Maximum number of texts generated at the same time, per run."""
    rows: int = 0
    """Number of slots decoded by one compiled program; 0: eight on a CPU, all on other devices."""
    queue: int = 64
    """Maximum number of texts waiting for a slot; beyond it requests are answered with status 429."""
    prefix_cache: int = 512
    """Memory for conversations, in MB per run: the next turn computes only its own tokens; 0: none."""
    max_prompt: int = 4096
    """Maximum length of a prompt in tokens."""
    max_tokens: int = 4096
    """Maximum length of a continuation in tokens."""
    max_body: int = 1_000_000
    """Maximum size of a request in bytes."""
    timeout: float = 300.0
    """Maximum time of a request in seconds, waiting included."""
    context: int = 0
    """Maximum length of a conversation in tokens; of a longer text attention sees the last ones. 0: the trained one."""


def check(options: Options) -> None:
    """Validate the options.

    Raises:
        UserError: Values are out of range (the message names all of them), or a package is missing.
    """
    minima = {
        "port": 0,
        "slots": 1,
        "rows": 0,
        "queue": 0,
        "prefix_cache": 0,
        "max_prompt": 1,
        "max_tokens": 1,
        "max_body": 1,
        "context": 0,
    }
    problems = []
    for name, minimum in minima.items():
        value = getattr(options, name)
        if value < minimum:
            problems.append(f"--{name} {value} must be {minimum} or more")
    for name, maximum in {"port": 65535, "slots": _MAX_SLOTS}.items():
        if getattr(options, name) > maximum:
            problems.append(f"--{name} {getattr(options, name)} must be {maximum} or less")
    if options.max_prompt + options.max_tokens >= 2**31:
        problems.append(
            f"--max_prompt {options.max_prompt} and --max_tokens {options.max_tokens} must be below 2^31 together"
        )
    if not options.timeout > 0:
        problems.append(f"--timeout {options.timeout} must be above 0")
    if not (is_loopback(options.host) or options.api_key or options.allow_no_key):
        problems.append(
            f"--host {options.host!r} lets the network use this server without a key: "
            "set --api_key KEY (or @FILE), or --allow_no_key if everybody may use it"
        )
    if options.follow and options.step not in ("", "last"):
        problems.append(f"--step {options.step} stays at one checkpoint, --follow loads the newest: give one of them")
    if problems:
        raise UserError("; ".join(problems))
    if missing := [name for name in ("starlette", "uvicorn", "httptools") if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{' and '.join(missing)} {verb} not installed: {install_command('serve')}")


def read_key(option: str) -> str:
    """Return the API key that the option `--api_key` gives.

    Args:
        option: The key, @FILE to read it from a file, or empty.

    Raises:
        UserError: The file cannot be read or is empty, or the key cannot be sent in a header.
    """
    key = option
    if option.startswith("@"):
        try:
            key = Path(option[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api_key {option}: cannot read the file: {error}") from None
        if not key:
            raise UserError(f"--api_key {option}: the file is empty")
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UserError("--api_key: only printable ASCII without leading or trailing spaces can be sent in a header")
    return key


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: The command line without the program's name; None: that of the process.

    Raises:
        UserError: Invalid options, no such run, or an address that cannot be listened on.
    """
    options = read_options(Options, args, "python -m slm_jax.serve")
    show_log()
    check(options)
    api_key = read_key(options.api_key)
    listening = _listen(options.host, options.port)  # a port in use is reported before anything is loaded
    with listening:
        _load_and_serve(options, listening, api_key)


def _load_and_serve(options: Options, listening: socket.socket, api_key: str) -> None:
    """Load the runs and serve them; connections that are opened earlier wait."""
    with without_garbage_collection():
        tune_process()
        from slm_jax.data.load import example_prompt
        from slm_jax.run.load import load_run
        from slm_jax.serve.app import Server
        from slm_jax.serve.completions import Limits
        from slm_jax.serve.engine import Engine
        from slm_jax.serve.runs import model_name

    engines: dict[str, Engine] = {}
    paths, folders = find_runs(options.run)
    for path in paths:
        loaded = load_run(path, step=options.step or ("last" if options.follow else ""))
        name = _unique(model_name(loaded.run.path.resolve()), engines)
        context = options.context or loaded.context
        logger.info("%s: run %s, %s, context of %d tokens", name, loaded.run.path, loaded.step_text, context)
        engines[name] = Engine(
            loaded, options.slots, options.queue, options.rows, options.context, name, options.prefix_cache
        )
    if not is_loopback(options.host):
        access = "with the API key" if api_key else "WITHOUT an API key"
        logger.warning("warning: listening on %s: the network can use this server %s", options.host, access)
    limits = Limits(options.max_prompt, options.max_tokens, options.timeout)
    step = options.step or ("last" if options.follow else "")
    app = Server(engines, limits, True, folders, options.follow, step).application(
        api_key, [options.host, *options.allow_host], options.max_body
    )
    name, engine = next(iter(engines.items()))
    _serve(app, options, listening, name, example_prompt(engine.run.run))


def find_runs(given: Sequence[str]) -> tuple[list[str | None], list[Path]]:
    """Return the runs to serve, and the folders whose runs the page shows.

    Args:
        given: Run directories, or folders of runs, which stand for the newest one in them with a checkpoint.

    Raises:
        UserError: A folder of runs has no run with a checkpoint.
    """
    from slm_jax.serve.runs import runs_in

    if not given:
        return [None], [RUNS]
    paths: list[str | None] = []
    folders = []
    for word in given:
        runs = [] if bare_words.is_run(word) else runs_in(Path(word))
        newest = first_readable(runs, trained=True)
        if runs and newest is None:
            raise UserError(f"no run in {word} has a checkpoint: train one with python -m slm_jax.train")
        if runs:
            folders.append(Path(word))
        paths.append(word if newest is None else str(newest.path))
    return paths, folders


def _unique(name: str, taken: Collection[str]) -> str:
    """Return the name, with a number appended if it is taken."""
    unique = name
    number = 2
    while unique in taken:
        unique = f"{name}-{number}"
        number += 1
    return unique


def _serve(app: Any, options: Options, listening: socket.socket, model: str, prompt: str) -> None:
    """Run the server until SIGINT or SIGTERM, after printing its address and an example request."""
    import uvicorn

    from slm_jax.serve.connections import BoundedProtocol, LogLimit, connection_limits, on_loop_error

    limits = connection_limits()
    protocol = type("Protocol", (BoundedProtocol,), {"max_connections": limits.connections})
    config = uvicorn.Config(
        app,
        options.host,
        options.port,
        http=protocol,
        ws="none",
        backlog=limits.backlog,
        log_level="error",  # its warnings are about invalid requests: any client could flood the log
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=30,
    )
    logging.getLogger("uvicorn.error").addFilter(LogLimit())
    port = listening.getsockname()[1]
    local = is_loopback(options.host) or options.host in ("0.0.0.0", "::")
    address = f"http://{'localhost' if local else options.host}:{port}"
    logger.info("\n%s/  (Ctrl-C stops)\n", address)
    key = " -H 'Authorization: Bearer KEY'" if options.api_key else ""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 40, "stream": True}, ensure_ascii=False)
    headers = f"-H 'Content-Type: application/json'{key}"
    logger.info("curl -N %s/v1/completions %s -d %s", address, headers, shlex.quote(body))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Start to listen."""
            asyncio.get_running_loop().set_exception_handler(on_loop_error)
            await super().startup(sockets)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Stop on SIGINT and SIGTERM with status 0; uvicorn itself would raise the signal again."""
            handlers = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for each, handler in handlers.items():
                    signal.signal(each, handler)

    start = time.perf_counter()
    asyncio.run(Server(config).serve([listening]))
    logger.info("stopped after %.0f s", time.perf_counter() - start)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, or raise UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except UnicodeError:
        raise UserError(f"cannot listen on {host!r}: this is no host name or address") from None
    except OSError as error:
        reason = error.strerror or error
        if error.errno and not isinstance(error, socket.gaierror):  # the numbers of a name lookup are others
            reason = os.strerror(error.errno)  # Python's own text has the address as well
        raise UserError(f"cannot listen on {host} port {port}: {reason}; --port 0 uses a free port") from None
