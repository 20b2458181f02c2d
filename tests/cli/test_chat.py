"""The chat in the terminal: a session over an engine, and the command as a real process in a pipe and in a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.cli.chat import Options, Terminal, main
from slm_jax.generation.sampling import Sampling
from slm_jax.serve.conversation import encode_chat
from slm_jax.serve.engine import Engine
from slm_jax.serve.session import ChatSession
from slm_jax.utils.errors import UserError
from tests.helpers import ONE_BLOCK, words_of
from tests.processes import Process
from tests.serve.conftest import loaded_run
from tokenizer import HybridTokenizer

TEXT = "The list is a Sequence. It returns the value of the first item, or None.\n" * 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A started engine of one slot over an untrained model."""
    tokenizer = HybridTokenizer()
    tokenizer.add_text(TEXT)
    tokenizer.freeze_vocab(vocab_size=400)
    engine = Engine(loaded_run(tmp_path_factory.mktemp("runs") / "tiny", tokenizer), 1, 1, 1)
    engine.start()
    yield engine
    engine.close()


def chat(engine, **options):
    return ChatSession(engine, Sampling(seed=3), **{"max_tokens": 8, **options})


def test_a_session_keeps_the_messages_and_reuses_them(engine):
    session = chat(engine, system="It returns")
    first = "".join(session.answer("The list"))
    second = "".join(session.answer("the first item"))
    assert [message.role for message in session.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.content for message in session.turns] == ["The list", first, "the first item", second]
    assert engine.counters.reused_tokens > 0
    again = chat(engine, system="It returns")
    assert "".join(again.answer("The list")) == first
    assert "".join(again.answer("the first item")) == second
    third = "".join(again.retry())
    assert third != second  # another seed
    assert again.turns[-2:] == [Message("user", "the first item"), Message("assistant", third)]
    again.reset()
    assert again.messages == [Message("system", "It returns")]
    again.set_system("")
    assert again.messages == []
    with pytest.raises(UserError, match="no message to answer again"):
        again.retry()


def test_the_oldest_turns_are_left_out_with_a_message(engine, caplog):
    caplog.set_level("INFO", "slm_jax.serve.session")
    session = chat(engine, system="It returns")
    for turn in range(9):
        "".join(session.answer(f"The list is a Sequence {turn}"))
    assert len(session.turns) == 18  # all of them can be saved
    assert "the context of 128 tokens is full: the model no longer sees the oldest turn" in caplog.text
    seen = session._seen()
    assert seen[0] == Message("system", "It returns")
    assert seen[1] == session.turns[session._left_out]
    template = ChatTemplate.of(engine.run.tokenizer)
    assert len(encode_chat(template, seen[:-1]).ids) + 8 <= 128
    with pytest.raises(UserError, match=r"the message is too long: .* the context has 128"):
        "".join(session.answer("list " * 200))
    assert len(session.turns) == 18


def test_an_answer_that_is_stopped_is_kept_and_frees_the_slot(engine):
    session = chat(engine, max_tokens=100)
    session._sampling = Sampling(seed=3, temperature=0.1)
    parts = session.answer("The list")
    text = next(parts)
    parts.close()
    assert session.turns == [Message("user", "The list"), Message("assistant", text)]
    assert engine.occupancy() == (0, 0)


def test_commands_of_the_terminal(engine, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", "slm_jax")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("mine")
    lines = ["The list", "", "/save chat.jsonl", "/save chat.jsonl", "/save other", "/save", "/nothing", "/help",
             "//item", "/system It returns", "/retry", "/reset", "/retry", "/save empty", "/quit", "never"]  # fmt: skip
    read, write = os.pipe()
    os.write(write, "\n".join([*lines, ""]).encode())
    os.close(write)
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(1), "w"))
    session = chat(engine)
    Terminal(session).serve()
    [row] = (tmp_path / "chat.jsonl").read_text().splitlines()
    messages = json.loads(row)["messages"]
    assert [(message["role"], message["content"]) for message in messages[:1]] == [("user", "The list")]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    for text in (
        "saved 2 messages to chat.jsonl",
        "other exists",
        "/save needs the name",
        "unknown command /nothing: /reset",
        "/retry        answer the last",
        "system message: It returns",
        "a new conversation",
        "no message to answer again",
        "no conversation to save",
    ):
        assert text in caplog.text
    assert session.messages == [Message("system", "It returns")]


def test_invalid_options_are_reported_together():
    with pytest.raises(UserError, match=r"--temperature -1.*--no_repeat_ngram 2 is not.*--max_tokens -3"):
        main(["--temperature", "-1", "--max_tokens", "-3", "--no_repeat_ngram", "2"])
    assert Options().sampling == Sampling()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "text.txt").write_text(TEXT * 20)
    length = {"train.steps": 2, "train.batch_size": 8, "train.sequence_length": 256}
    tiny = words_of({**ONE_BLOCK, **length, "tokenizer.vocab_size": 300, "eval.sample_tokens": 4})
    command = [sys.executable, "-m", "slm_jax.train", "--run", str(folder / "tiny"), "--data.files"]
    subprocess.run([*command, str(folder / "text.txt"), *tiny], check=True, capture_output=True)
    return folder / "tiny"


@pytest.mark.slow
def test_in_a_pipe_every_line_is_a_message(run, tmp_path):
    command = [sys.executable, "-m", "slm_jax.chat", "--run", str(run), "--max_tokens", "6", "--seed", "1"]
    lines = f"The list\nthe first item\n/save {tmp_path / 'saved.jsonl'}\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    messages = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)  # no prompts, no colors
    assert "not trained on conversations" in done.stderr
    again = subprocess.run(command, input="The list\n", capture_output=True, text=True, timeout=200)
    assert again.stdout == f"{answers[0]}\n"


def read_until(terminal, text, seconds=120):
    """Read what a process writes to its terminal until a text occurs in it."""
    end = time.monotonic() + seconds
    output = ""
    while text not in output:
        assert time.monotonic() < end, output
        if select.select([terminal], [], [], 1)[0]:
            output += os.read(terminal, 65536).decode(errors="replace")
    return output


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(run):
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "slm_jax.chat", "--run", str(run), "--temperature", "3", "--top_p", "1"]
    environment = os.environ | {"TERM": "dumb"}
    process = Process(command, stdin=inside, stdout=inside, stderr=inside, env=environment, start_new_session=True)
    os.close(inside)
    read_until(terminal, "> ")
    os.write(terminal, b"/help\n")
    assert "/save FILE" in read_until(terminal, "/quit")
    os.write(terminal, b"The list\n")
    time.sleep(1)
    for _ in range(40):  # at any instant of the answer, also while programs are compiled
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.poll() is None
    os.write(terminal, b"/system It returns\n")
    read_until(terminal, "system message: It returns")
    os.write(terminal, b"\x1b[A\x01")  # nothing of a dumb terminal is needed for the history
    os.write(terminal, b"\n\x04")
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                output = os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
            assert "Traceback" not in output
            if re.search(r"> $", output):
                os.write(terminal, b"\x04")
    assert process.wait(30) == 0
    os.close(terminal)
