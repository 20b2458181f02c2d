"""The command `python -m slm_jax.chat`: talk to a model in the terminal, or in a pipe."""

import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slm_jax.cli import bare_words
from slm_jax.cli.options import Flag, read_options
from slm_jax.generation.settings import Sampling
from slm_jax.run.directory import find_run
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import replace_text
from slm_jax.utils.process import tune_process, without_garbage_collection
from slm_jax.utils.progress import show_log

if TYPE_CHECKING:
    from slm_jax.serve.session import ChatSession

logger = logging.getLogger(__name__)

_DEFAULT = Sampling()
_COMMANDS = {
    "/reset": "begin a new conversation; the system message stays",
    "/system TEXT": "set the system message; without TEXT: remove it",
    "/retry": "answer the last message again",
    "/save FILE": "save the conversation as JSON, one line in OpenAI's messages format, usable as training data",
    "/help": "list the commands; //TEXT sends a message that begins with /",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops the answer",
}


@dataclass(frozen=True)
class Options:
    """Talk to the model of a run.

    In a terminal, /help lists the commands. In a pipe, every line of standard input is a message, and the answers are
    written to standard output.

        python -m slm_jax.chat runs/NAME
        echo 'What is a list?' | python -m slm_jax.chat
    """

    run: Annotated[str, Flag(metavar="PATH", bare=bare_words.run_folders())] = ""
    """The run directory; empty: the newest in runs/."""
    step: Annotated[str, Flag(metavar="best|last|N")] = ""
    """The checkpoint; empty: the best one if the validation does not improve any more, otherwise the last."""
    system: Annotated[str, Flag(metavar="TEXT")] = ""
    """The system message: instructions before the conversation; empty: none."""
    max_tokens: int = 0
    """Maximum length of an answer in tokens; 0: what the context has room for."""
    context: int = 0
    """Maximum length of the conversation in tokens, beyond which the oldest turns are left out; 0: the trained one."""
    sampling: Sampling = _DEFAULT


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: The command line without the program's name; None: that of the process.

    Raises:
        UserError: Invalid options, no such run, or its tokenizer has no chat template.
    """
    options = read_options(Options, args, "python -m slm_jax.chat")
    show_log()
    problems = [f"--{problem}" for problem in options.sampling.problems()]
    if options.sampling.no_repeat_ngram:
        problems.append(f"--no_repeat_ngram {options.sampling.no_repeat_ngram} is not supported in a conversation")
    for name in ("max_tokens", "context"):
        if getattr(options, name) < 0:
            problems.append(f"--{name} {getattr(options, name)} must be 0 or more")
    if problems:
        raise UserError("; ".join(problems))
    run = find_run(options.run or None, trained=True)  # that there is none is reported without waiting for JAX
    with without_garbage_collection():
        tune_process()
        from slm_jax.run.conversations import is_chat_trained
        from slm_jax.run.load import load_run
        from slm_jax.serve.engine import Engine
        from slm_jax.serve.session import ChatSession

    loaded = load_run(str(run.path), step=options.step)
    engine = Engine(loaded, slots=1, queue_size=1, block_slots=1, context=options.context)
    session = ChatSession(engine, options.sampling, options.max_tokens, options.system)
    logger.info("run %s, %s, context of %d tokens", loaded.run.path, loaded.step_text, engine.context)
    if not is_chat_trained(loaded.run):
        logger.info("note: this run was not trained on conversations: it may continue the text instead of answering")
    engine.start()
    try:
        Terminal(session).serve()
    finally:
        engine.close()


class Terminal:
    """Reads messages and commands, and writes answers to standard output, everything else to standard error."""

    def __init__(self, session: "ChatSession"):
        """Take the standard streams."""
        self._session = session
        self._is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._saved: set[Path] = set()
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    def serve(self) -> None:
        """Answer until the end of the input or /quit.

        Raises:
            KeyboardInterrupt: Ctrl-C in a pipe.
        """
        if self._is_interactive:
            logger.info("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        for line in self._lines():
            if not line.strip():
                continue
            if line.strip() == "/quit":
                return
            try:
                self._handle(line)
            except UserError as error:
                logger.warning("%s", error)

    def _lines(self) -> Iterator[str]:
        """Yield lines of the input: with a prompt and history in a terminal, as they are in a pipe."""
        if not self._is_interactive:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` history and editing)
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                logger.info("(Ctrl-D ends)")

    def _handle(self, line: str) -> None:
        """Run a command, or answer a message."""
        if not line.startswith("/") or line.startswith("//"):
            self._answer(self._session.answer(line.removeprefix("/") if line.startswith("//") else line))
            return
        command, _, value = line.strip().partition(" ")
        value = value.strip()
        if command == "/retry":
            self._answer(self._session.retry())
        elif command == "/reset":
            self._session.reset()
            logger.info("a new conversation")
        elif command == "/system":
            self._session.set_system(value)
            logger.info("system message: %s", value or "none")
        elif command == "/save":
            self._save(value)
        elif command == "/help":
            width = max(map(len, _COMMANDS)) + 2
            logger.info("\n".join(f"{name:{width}}{purpose}" for name, purpose in _COMMANDS.items()))
        else:
            raise UserError(f"unknown command {command}: {', '.join(_COMMANDS)}")

    def _answer(self, parts: Iterator[str]) -> None:
        """Write an answer as it is generated; in a terminal, Ctrl-C stops it."""
        try:
            for part in parts:
                sys.stdout.write(part)
                sys.stdout.flush()
        except KeyboardInterrupt:
            parts.close()  # type: ignore[attr-defined]
            if not self._is_interactive:
                raise
            logger.info("\n(stopped)")
            return
        print(flush=True)

    def _save(self, name: str) -> None:
        """Save the conversation as one line of JSON.

        Raises:
            UserError: There is nothing to save, no name, or a file that this session did not write.
        """
        if not name:
            raise UserError("/save needs the name of a file: /save chat.jsonl")
        if not self._session.turns:
            raise UserError("there is no conversation to save")
        path = Path(name).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise UserError(f"{shlex.quote(name)} exists: give another name")
        content = {"messages": [message._asdict() for message in self._session.messages]}
        try:
            replace_text(path, json.dumps(content) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {name}: {error.strerror}") from None
        self._saved.add(path.resolve())
        logger.info("saved %d messages to %s", len(self._session.messages), name)
