"""The command: invalid options, and a real process from its start to a signal."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from unittest.mock import Mock

import pytest

from slm_jax.cli.serve import Options, check, is_loopback, main, read_key
from slm_jax.serve.runs import model_name
from slm_jax.utils.errors import UserError
from tests.helpers import ONE_BLOCK, words_of
from tests.processes import Process

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def test_invalid_options_are_reported_together():
    with pytest.raises(UserError, match=r"port -1.*slots 0.*queue -2"):
        check(Options(port=-1, slots=0, queue=-2))
    with pytest.raises(UserError, match="timeout 0"):
        check(Options(timeout=0))
    with pytest.raises(UserError, match="65535"):
        check(Options(port=70000))
    with pytest.raises(UserError, match="slots 1000000000 must be 16384 or less"):
        check(Options(slots=10**9))
    with pytest.raises(UserError, match="below 2"):
        check(Options(max_tokens=2**31 - 4096))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.7", "my.name"])
def test_the_network_is_refused_without_a_key(host):
    with pytest.raises(UserError, match=f"host {host!r} .*--api_key KEY .*--allow_no_key"):
        check(Options(host=host))
    check(Options(host=host, api_key="sesame"))
    check(Options(host=host, allow_no_key=True))


def test_this_machine_needs_no_key():
    for host in ("127.0.0.1", "::1", "localhost"):
        check(Options(host=host))


def test_the_key_is_read_from_a_file(tmp_path):
    (tmp_path / "key").write_text("sesame\n")
    (tmp_path / "empty").write_text("\n")
    assert read_key(f"@{tmp_path / 'key'}") == "sesame"
    assert read_key("open") == "open"
    for name, words in (("empty", "is empty"), ("none", "cannot read")):
        with pytest.raises(UserError, match=words):
            read_key(f"@{tmp_path / name}")
    for key in ("schlüssel", "a\nb", " a"):
        with pytest.raises(UserError, match="printable ASCII"):
            read_key(key)


def test_is_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.7", "my.name")))


def test_models_are_named_after_their_folders():
    assert model_name(Path("/runs/mine")) == "mine"
    assert model_name(Path("/runs/school/stages/02-prose")) == "school-02-prose"


def test_a_missing_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        main(["--run", str(tmp_path), "--port", "0"])


def test_a_port_in_use_is_reported_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UserError, match="Address already in use;"):
        main(["--run", str(tmp_path), "--port", str(other.getsockname()[1])])


def test_the_reason_of_a_failed_name_lookup_is_its_own(tmp_path, monkeypatch):
    unknown = socket.gaierror(8, "nodename nor servname provided")  # 8 on BSD, where errno 8 is "Exec format error"
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=unknown))
    with pytest.raises(UserError, match="port 80: nodename nor servname provided; --port 0"):
        main(["--run", str(tmp_path), "--host", "localhost", "--port", "80"])
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"cannot listen on 'a\.\.b': this is no host name or address"):
        main(["--run", str(tmp_path), "--host", "a..b", "--allow_no_key"])


@pytest.mark.slow
def test_a_process_serves_warns_and_exits_cleanly(tmp_path):
    """Train, serve on all addresses without a key, request a text, and send SIGTERM while it is generated."""
    run = tmp_path / "tiny"
    tiny = words_of({**ONE_BLOCK, "train.steps": 2, "train.batch_size": 8, "eval.sample_tokens": 4})
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: the list is a sequence of {i * 7 % 13} items.\n" for i in range(600)))
    train = [sys.executable, "-m", "slm_jax.train", "--run", str(run), "--data.files", str(text), *tiny]
    subprocess.run(train, check=True, capture_output=True)
    command = [sys.executable, "-m", "slm_jax.serve", "--run", str(run), "--port", "0"]
    command += ["--host", "0.0.0.0", "--allow_no_key"]
    with Process(command, stderr=subprocess.PIPE, text=True) as process:
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
        assert rest.rstrip().splitlines()[-1].startswith("data: ")  # [DONE], or the error that the server stopped
        log = process.stderr.read()
    assert process.returncode == 0, log
    assert "stopped after" in log
    assert "Traceback" not in log
