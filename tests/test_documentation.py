"""Documentation agrees with the code: links, commands, options, files, snippets, sizes and the form of docstrings."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import urllib.parse
from pathlib import Path

import pytest

import slm_jax
from slm_jax.config.curriculum import Curriculum
from slm_jax.config.schema import Config
from tests.helpers import ONE_BLOCK

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "configs", "notebooks", "slm_jax", "tests", "tokenizer")
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / ".github").glob("*.md"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")),
    ]
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FILES = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}

# A snippet with this word behind its language is not run: it needs a network, an extra or an accelerator.
NOT_RUN = "no-run"
# Stand for any option, or belong to other programs.
OTHER_OPTIONS = {
    "section.field",
    "section.option",
    "help",
    "hypothesis_profile",
    "xla_force_host_platform_device_count",
    *("array", "dependency", "parsable", "requeue", "wrap"),  # of Slurm's sbatch
}
TINY = {**ONE_BLOCK, "train.steps": 4, "train.batch_size": 8, "eval.sample_tokens": 8}


def read(path):
    return path.read_text(encoding="utf-8")


def prose_of(text):
    """Return Markdown without its fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```", "", text)


def blocks_of(text, *languages):
    """Return (words behind the fence, body) of the fenced blocks of some languages."""
    blocks = re.findall(r"(?ms)^ *```(.*?)$\n(.*?)^ *```", text)
    return [(info.split(), textwrap.dedent(body)) for info, body in blocks if (info.split() or [""])[0] in languages]


def anchors_of(text):
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ +(.*?) *$", re.sub(r"(?ms)^ *```.*?^ *```", "", text))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


def links_of(text):
    """Return the targets of links and images, without those of other sites."""
    prose = re.sub(r"`[^`\n]*`", "", prose_of(text))
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", prose)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name):
    path = ROOT / name
    broken = []
    for target in links_of(read(path)):
        file, _, anchor = urllib.parse.unquote(target).partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors_of(read(linked))):
            broken.append(target)
    assert not broken


def test_every_document_is_reachable_from_the_front_page():
    reached, pending = set(), [ROOT / "README.md"]
    while pending:
        path = pending.pop()
        if path not in reached:
            reached.add(path)
            linked = [(path.parent / target.partition("#")[0]).resolve() for target in links_of(read(path))]
            linked += [file / "README.md" for file in linked if file.is_dir()]
            pending += [file for file in linked if file.suffix == ".md" and file.is_file()]
    assert {path.resolve() for path in DOCUMENTS} - {path.resolve() for path in reached} == set()


def test_sizes():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= 180
    assert len(text.encode()) <= 10_000


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    named = set(re.findall(r"`([\w./-]*\w\.(?:py|toml|ipynb|css|js))`", prose_of(read(ROOT / name))))
    named -= {
        "multi_train_orchestrator.py",
        "pyproject.toml",
        "config.toml",
        "curriculum.toml",
        "sweep.toml",
        "scaling.toml",
        "my.toml",
        "my.py",
    }  # of the original project, of a run, or of the user
    assert [file for file in sorted(named) if not any(f"/{known}".endswith(f"/{file}") for known in FILES)] == []


def code_of(text):
    """Return the shell commands of a document: lines of its shell blocks and its inline code."""
    lines = [line for _, body in blocks_of(text, "bash", "sh") for line in body.replace("\\\n", " ").splitlines()]
    lines = [line.partition(" #")[0] for line in lines] + re.findall(r"`([^`\n]+)`", prose_of(text))
    return [part.strip() for line in lines for part in line.replace("\\|", "|").split("&&")]


PRINT_HELP = """
import contextlib, io, json, runpy, sys
texts = {}
for command in sys.argv[1:]:
    module, *rest = command.split()
    sys.argv = [module, *rest, "--help"]
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            texts[command] = "" if end.code else None
    output.flush()
    texts[command] = output.buffer.getvalue().decode() if command in texts and texts[command] is None else ""
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def help_texts():
    """The output of `python -m COMMAND --help` for each command and subcommand that a document names."""
    commands = {" ".join(filter(None, match)) for _, match in uses_of_commands()}
    commands |= {"slm_jax.train", *(command.split()[0] for command in commands)}
    arguments = [sys.executable, "-c", PRINT_HELP, *sorted(commands)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def uses_of_commands():
    """Yield (code, (module, subcommand or "")) for each of our commands in the documents."""
    for path in DOCUMENTS:
        for code in code_of(read(path)):
            for match in re.findall(r"-m ((?:slm_jax|tokenizer)(?:\.\w+)?)(?![\w.])(?: ([a-z]+)\b)?", code):
                yield code, match


def source_of(script):
    """Return the source of a script with its options as in a help text."""
    return read(script).replace('"--', " --")


def has_option(text, option):
    pattern = "[-_]".join(re.escape(word) for word in re.split("[-_]", option))
    return re.search(rf"(?<![\w-])--{pattern}(?![\w-])", text) is not None


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_options_exist(name, help_texts):
    fields = {*Config().flat(), *(f"{section}." for section in Config.model_fields), *OTHER_OPTIONS}
    scripts = "".join(source_of(path) for path in (ROOT / name).parent.glob("*.py"))
    unknown = []
    for code in code_of(read(ROOT / name)):
        for module in re.findall(r"-m ((?:slm_jax|tokenizer)[\w.]*)", code):
            assert importlib.util.find_spec(module), code
        options = re.findall(r"(?<![\w-])--([a-zA-Z](?:[\w-]|\.(?=[\w*]))*)", code)
        options = [option for option in options if option.replace("-", "_") not in fields]
        command = re.search(r"python3? -m ((?:slm_jax|tokenizer)(?:\.\w+)?)(?![\w.])(?: ([a-z]+)\b)?", code)
        script = re.search(r"python3? (\S+\.py)", code)
        if command:
            text = help_texts[" ".join(filter(None, command.groups()))]
            assert text, f"{command[0]} --help fails"
        elif script:
            assert (ROOT / script[1]).is_file(), code
            text = source_of(ROOT / script[1]) + help_texts["slm_jax.train"]  # to which some pass options on
        elif code.startswith("--"):
            text = "".join(help_texts.values()) + scripts
        else:
            continue
        unknown += [f"{code}: --{option}" for option in options if not has_option(text, option)]
    assert not unknown


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A trained run of a few steps."""
    from slm_jax import train

    return train(Config.load(**TINY), tmp_path_factory.mktemp("runs") / "NAME").run


SNIPPETS = {
    name: [body for info, body in blocks_of(read(ROOT / name), "python") if NOT_RUN not in info] for name in NAMES
}


@pytest.mark.parametrize("name", [name for name, snippets in SNIPPETS.items() if snippets])
def test_python_snippets_run(name, tmp_path, monkeypatch, request):
    """All snippets of a document, in order and in one namespace, with the options of a tiny model."""
    for kind in (Config, Curriculum):
        load = kind.load.__func__

        def tiny_load(cls, *args, load=load, **overrides):
            return load(cls, *args, **{**{key.replace("__", "."): value for key, value in overrides.items()}, **TINY})

        monkeypatch.setattr(kind, "load", classmethod(tiny_load))
    text = "".join(
        f"The cat number {i} sat on a mat. Once upon a time there was a model of {i * i} words.\n" for i in range(99)
    )
    for file in (
        "my.txt",
        "notes.md",
        "my/one.txt",
        "my/two.txt",
        "data/one.txt",
        "data/deep/two.txt",
        "books/one.txt",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    if any("runs/NAME" in snippet for snippet in SNIPPETS[name]):
        shutil.copytree(request.getfixturevalue("tiny_run"), tmp_path / "runs" / "NAME")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippet"}
    for snippet in SNIPPETS[name]:
        exec(compile(snippet, name, "exec"), namespace)


def docstrings():
    for package in ("slm_jax", "tokenizer"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(read(path))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text:
                        yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text


def test_docstrings_start_with_an_imperative_or_a_noun_phrase():
    """Less than 3 % begin with a relative clause in place of an imperative or a noun phrase."""
    every = list(docstrings())
    clauses = [where for where, text in every if re.match(r"(What|Whether|Where|Which|Of|That)\b", text)]
    assert len(clauses) < 0.03 * len(every), clauses


def test_one_version_number():
    pyproject = read(ROOT / "pyproject.toml")
    assert 'dynamic = ["version"]' in pyproject
    assert not re.search(r"(?m)^version =", pyproject)
    assert re.search(rf"(?m)^## \[?{re.escape(slm_jax.__version__)}", read(ROOT / ".github" / "CHANGELOG.md"))


def update_links(root, *args):
    command = [sys.executable, str(root / "notebooks" / "update_links.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_links_point_to_the_repository_of_pyproject():
    done = update_links(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_can_be_pointed_to_another_repository(tmp_path):
    for folder in ("notebooks", ".github"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    url = "https://github.com/some-one/a.fork"
    pyproject = tmp_path / "pyproject.toml"
    before = re.search(r'Repository = "(.*)"', read(pyproject))[1]
    pyproject.write_text(read(pyproject).replace(f'Repository = "{before}"', f'Repository = "{url}"'), encoding="utf-8")
    assert update_links(tmp_path, "--check").returncode == 1
    done = update_links(tmp_path, "--repository", f"{url}.git")
    assert done.returncode == 0, done.stderr
    assert update_links(tmp_path, "--check").returncode == 0
    changed = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".md", ".ipynb", ".toml", ".cff")
    ]
    assert not [path for path in changed if before in read(path)]
    assert url in read(tmp_path / "notebooks" / "02_train_colab.ipynb")
    slug = url.removeprefix("https://github.com/")
    assert f"colab.research.google.com/github/{slug}/" in read(tmp_path / "notebooks" / "02_train_colab.ipynb")
    update_links(tmp_path, "--repository", before)
    assert read(tmp_path / "notebooks" / "02_train_colab.ipynb") == read(ROOT / "notebooks" / "02_train_colab.ipynb")


def test_a_repository_that_colab_cannot_open_is_refused(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = update_links(tmp_path, "--repository", "https://example.org/me/slm_jax")
    assert done.returncode == 1
    assert "expected https://github.com/OWNER/NAME" in done.stderr


def test_the_workflow_runs_the_checks():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(read(ROOT / ".github" / "workflows" / "ci.yml"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run", ".ci/versions ${{ matrix.versions }}"]
    matrix = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    pythons = {entry["versions"]: entry["python"] for entry in matrix}
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    supported = [re.search(r"Python :: (3\.\d+)", line) for line in project["classifiers"]]
    assert pythons == dict(zip(("lowest", "newest"), [match[1] for match in supported if match], strict=True))
    assert project["requires-python"] == f">={pythons['lowest']}"
    assert all((ROOT / ".ci" / name).stat().st_mode & 0o111 for name in ("run", "versions"))
