"""The command: what it refuses, and a real process from its first line to a signal."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from slm_jax.cli.serve import Options, check, is_loopback, main, model_name, read_key
from slm_jax.utils.errors import UserError

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def test_what_cannot_be_is_told_together():
    with pytest.raises(UserError, match=r"port -1.*slots 0.*queue -2"):
        check(Options(port=-1, slots=0, queue=-2))
    with pytest.raises(UserError, match="timeout 0"):
        check(Options(timeout=0))
    with pytest.raises(UserError, match="65535"):
        check(Options(port=70000))
    with pytest.raises(UserError, match="below 2"):
        check(Options(max_tokens=2**31 - 4096))


def test_the_key_may_stand_in_a_file(tmp_path):
    (tmp_path / "key").write_text("sesame\n")
    (tmp_path / "empty").write_text("\n")
    assert read_key(f"@{tmp_path / 'key'}") == "sesame"
    assert read_key("open") == "open"
    for name, words in (("empty", "is empty"), ("none", "cannot be read")):
        with pytest.raises(UserError, match=words):
            read_key(f"@{tmp_path / name}")
    for key in ("schlüssel", "a\nb", " a"):
        with pytest.raises(UserError, match="printable ASCII"):
            read_key(key)


def test_who_can_reach_an_address():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.7", "my.name")))


def test_models_go_by_the_names_of_their_folders():
    assert model_name(Path("/runs/mine")) == "mine"
    assert model_name(Path("/runs/school/stages/02-prose")) == "school-02-prose"


def test_no_run_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        main(["--run", str(tmp_path)])


@pytest.mark.slow
def test_a_process_serves_warns_and_ends_cleanly(tmp_path):
    """Trained, served on all addresses without a key, asked, and stopped by SIGTERM while a text is being written."""
    run = tmp_path / "tiny"
    tiny = "--model.dim 32 --model.heads 2 --model.mlp_dim 64 --model.depth 1 --train.steps 2 --train.batch_size 8"
    tiny += " --train.sequence_length 32 --eval.max_tokens 500 --tokenizer.vocab_size 300 --eval.sample_tokens 4"
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: the list is a sequence of {i * 7 % 13} items.\n" for i in range(600)))
    train = [sys.executable, "-m", "slm_jax.train", "--run", str(run), "--data.files", str(text), *tiny.split()]
    subprocess.run(train, check=True, capture_output=True)
    command = [sys.executable, "-m", "slm_jax.serve", "--run", str(run), "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("curl"):
                break
        shown = "".join(lines)
        assert "WITHOUT an API key" in shown
        url = re.search(r"^(http://localhost:\d+)/", shown, re.M)[1]
        assert f"curl -N {url}/v1/completions" in shown
        assert re.search(r'"prompt": "Line \d+: the list", "max_tokens": 40', shown)
        body = {"prompt": "The list", "max_tokens": 400, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.readline().startswith(b"data: {")
            process.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert rest.rstrip().splitlines()[-1].startswith("data: ")  # [DONE], or in words that the server stopped
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert "stopped after" in said
    assert "Traceback" not in said
