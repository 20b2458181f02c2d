"""Uploads with the real client of the hub, to a hub on the loopback device."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

constants = pytest.importorskip("huggingface_hub.constants", reason="pip install -e '.[hub]'")

from slm_jax.huggingface.push import Hub  # noqa: E402  # after the check for the library
from slm_jax.utils.errors import UserError  # noqa: E402
from tests.huggingface.upload_server import TOKEN, UploadHub  # noqa: E402


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = UploadHub(tmp_path / "hub")
    # The library reads the environment when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol for large files needs other servers
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (folder / "config.json").write_text('{"a": 1}')
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_repository_has_the_files_of_the_folder(server, folder):
    url = Hub("ada/story", private=True).upload(folder, "plays, step 7")
    repository = server.folder / "ada/story"
    assert contents(repository) == contents(folder)
    assert url == f"{server.url}/ada/story"
    assert server.messages == ["plays, step 7"]
    assert (server.folder / "visibility").read_text() == "private"


def test_weights_of_an_earlier_upload_are_replaced(server, folder):
    """A sharded model, then a smaller one: no shard may stay. Files that the owner added do."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    Hub("ada/story").upload(folder, "large")
    repository = server.folder / "ada/story"
    (repository / "banner.png").write_bytes(b"png")
    for path in folder.iterdir():
        path.unlink()
    (folder / "model.safetensors").write_bytes(b"small")
    Hub("ada/story").upload(folder, "small")
    names = {"model.safetensors", "config.json", "banner.png"}
    assert {path.name for path in repository.iterdir()} == names
    assert (repository / "model.safetensors").read_bytes() == b"small"


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("story", TOKEN, "--push story: give OWNER/NAME"),
        ("a/b/c", TOKEN, "give OWNER/NAME"),
        ("ada/story", "", "no access token: run `hf auth login`"),
        ("ada/story", "hf_wrong", "the hub refuses the access token"),
    ],
)
def test_faults_are_reported_before_the_export(server, monkeypatch, tmp_path, name, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=message):
        Hub(name)
    assert not server.folder.exists()


def test_an_export_of_the_other_format_stays(server, folder):
    Hub("ada/story").upload(folder, "weights")
    for path in folder.iterdir():
        path.unlink()
    (folder / "story-q8_0.gguf").write_bytes(b"GGUF")
    Hub("ada/story").upload(folder, "gguf")
    names = {path.name for path in (server.folder / "ada/story").iterdir()}
    assert names == {"model.safetensors", "config.json", "story-q8_0.gguf"}


def test_a_public_repository_is_not_taken_for_a_private_one(server, folder):
    Hub("ada/story").upload(folder, "public")
    with pytest.raises(UserError, match="the repository exists and is public"):
        Hub("ada/story", private=True)


def test_a_token_that_may_only_read_is_refused(server):
    server.role = "read"
    with pytest.raises(UserError, match="may only read"):
        Hub("ada/story")


def test_an_unreachable_hub_is_reported(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        Hub("ada/story")


def test_a_refused_commit_keeps_the_export(server, folder):
    before = contents(folder)
    hub = Hub("ada/story")
    server.refused = 403
    with pytest.raises(UserError, match=r"the access token may not write there.*is complete: hf upload ada/story"):
        hub.upload(folder, "plays")
    assert contents(folder) == before


@pytest.mark.slow
def test_command(server, tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "run/run_0.1.0", tmp_path / "run")
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "slm_jax.export", "--run", tmp_path / "run", "--to", tmp_path / "out"]
    done = subprocess.run([*command, "--push", "ada/story"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {server.url}/ada/story" in done.stdout
    repository = server.folder / "ada/story"
    assert contents(repository) == contents(tmp_path / "out")
    assert json.loads((repository / "config.json").read_text())["architectures"]
