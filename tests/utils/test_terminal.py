"""Lines, bars and counters on a real terminal: what its screen shows in the end, and at any time in between."""

import contextlib
import fcntl
import logging
import os
import struct
import termios
import threading
import time

from slm_jax.utils import progress
from slm_jax.utils.waiting import waiting


class Terminal:
    """A pseudo-terminal, and the screen that its output amounts to."""

    def __init__(self, columns):
        self.columns = columns
        self._controller, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.stream = os.fdopen(terminal, "w", encoding="utf-8")
        self._output = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        try:
            while data := os.read(self._controller, 65536):
                self._output += data
        except OSError:  # closed at the other end
            return

    def close(self):
        self.stream.close()
        self._reader.join(10)
        os.close(self._controller)

    @property
    def screen(self):
        """The lines of the screen, as a terminal with automatic margins shows them."""
        lines = [[]]
        row = column = 0
        text = self._output.decode().replace("\x1b[K", "\x00").replace("\x1b[A", "\x01")
        for character in text:
            if character == "\r":
                column = 0
            elif character == "\n":
                row += 1
            elif character == "\x00":
                del lines[row][column:]
            elif character == "\x01":
                row = max(0, row - 1)
            else:
                if column == self.columns:
                    row += 1
                    column = 0
                lines += [[] for _ in range(row + 1 - len(lines))]
                lines[row] += " " * (column + 1 - len(lines[row]))
                lines[row][column] = character
                column += 1
            lines += [[] for _ in range(row + 1 - len(lines))]
        return ["".join(line).rstrip() for line in lines]


@contextlib.contextmanager
def stderr_on_a_terminal(columns=70):
    """Show stderr and the log of this process on a terminal while the block runs."""
    terminal = Terminal(columns)
    logger = logging.getLogger("slm_jax")
    handler = progress._StderrHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stderr(terminal.stream):
            yield terminal
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        terminal.close()


def log(text):
    logging.getLogger("slm_jax.example").info("%s", text)


def test_lines_are_above_the_bar():
    with stderr_on_a_terminal() as terminal:
        log("MFU baseline: 0.391 TFLOP/s (fastest matmul), " + "which is longer than a line " * 3)
        bar = progress.ProgressBar(40, 0, 10)
        log("before the first step")
        for step in range(1, 41):
            bar.show(step, f"loss {5 - step / 10:.3f}")
            if step % 20 == 0:
                log(f"step {step}: validation loss 3.092")
                progress.write_line("a warning")
        bar.close()
        log("done")
    screen = [line for line in terminal.screen if line]
    assert screen[0].startswith("MFU baseline: 0.391 TFLOP/s (fastest matmul), which is")  # two lines of the screen
    assert screen[2:7] == ["before the first step", *["step 20: validation loss 3.092", "a warning"],
                           *["step 40: validation loss 3.092", "a warning"]]  # fmt: skip
    assert screen[7].startswith("100%|")
    assert screen[7].endswith("| 40/40, loss 1.000")
    assert screen[8:] == ["done"]


def test_lines_are_above_the_counter():
    with stderr_on_a_terminal() as terminal:
        with waiting("compiling a model of 0.02 M parameters"):
            log("batch of 16 does not fit into memory: 8 at a time")
            time.sleep(1.2)  # the counter is drawn once more
            progress.write_line("a cached program is damaged")
            with waiting("a part of it"):
                pass
        log("memory: 1 MB per step")
    screen = [line for line in terminal.screen if line]
    assert screen[:3] == [
        "batch of 16 does not fit into memory: 8 at a time", "a cached program is damaged", "a part of it…",
    ]  # fmt: skip
    assert screen[3].startswith("a part of it: 0.")
    assert screen[4].startswith("compiling a model of 0.02 M parameters… 1.")
    assert screen[5:] == ["memory: 1 MB per step"]


def test_a_long_counter_does_not_wrap():
    text = "multiple choice: " + "a very long name of a data set " * 9
    with stderr_on_a_terminal() as terminal, waiting(text):
        time.sleep(1.2)
    (line,) = [line for line in terminal.screen if line]
    assert len(line) < 70
    assert line.startswith("multiple choice: a very long name")


def test_elsewhere_lines_are_plain(capsys):
    with waiting("compiling"):
        progress.write_line("a line")
    bar = progress.ProgressBar(4, 0, 2)
    for step in range(1, 5):
        bar.show(step, "loss 1")
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["compiling…", "a line"]
    assert lines[2].startswith("compiling: 0.")
    assert lines[3:] == ["step 2/4  loss 1", "step 4/4  loss 1"]
