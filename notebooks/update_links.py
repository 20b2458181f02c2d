"""Point the links of notebooks and documentation to the repository that pyproject.toml names.

    python notebooks/update_links.py                   rewrite the links
    python notebooks/update_links.py --check           report outdated links, with exit status 1
    python notebooks/update_links.py --repository URL  set the repository, then rewrite the links

`Repository` in [project.urls] of pyproject.toml is the only place that defines the owner and name of the repository.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"
# Each pattern matches a link to this repository, whatever its owner; the replacement is filled in with the current one.
LINKS = {
    r"https://colab\.research\.google\.com/github/[^/\s\"]+/[^/\s\"]+/blob/[^/\s\"]+/notebooks/": (
        "https://colab.research.google.com/github/{slug}/blob/{branch}/notebooks/"
    ),
    r'REPOSITORY = (\\?")https://[^"\\]+': r"REPOSITORY = \1{url}",
    r"git clone https://[^\s`]+": "git clone {url}",
    r"git\+https://[^\s`\"'#]+": "git+{url}",
    r'repository-code: "https://[^"]+': 'repository-code: "{url}',
    r'(Changelog|Documentation|Homepage|Issues) = "https://[^/"]+/[^/"]+/[^/"]+': r'\1 = "{url}',
}


def main() -> int:
    """Rewrite or check the links; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only report files whose links are out of date")
    parser.add_argument("--repository", metavar="URL", help="set the repository in pyproject.toml first")
    options = parser.parse_args()
    if options.repository:
        set_repository(options.repository)
    url = repository()
    outdated = [path for path in linked_files() if updated(read(path), url) != read(path)]
    for path in outdated:
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'updated'}")
        if not options.check:
            path.write_text(updated(read(path), url), encoding="utf-8", newline="")
    if options.check and outdated:
        print(f"links should point to {url}: run python notebooks/update_links.py")
        return 1
    return 0


def repository() -> str:
    """Return the URL of the repository. Exit with a message unless it has the form https://github.com/OWNER/NAME."""
    url = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["urls"]["Repository"]
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        sys.exit(f"Repository = {url!r}: expected https://github.com/OWNER/NAME, the only host that Colab opens")
    return url


def set_repository(url: str) -> None:
    """Write the URL of the repository to pyproject.toml."""
    path = ROOT / "pyproject.toml"
    text = re.sub(r'(?m)^Repository = ".*"$', f'Repository = "{url.rstrip("/").removesuffix(".git")}"', read(path))
    path.write_text(text, encoding="utf-8", newline="")


def updated(text: str, url: str) -> str:
    """Return a file's text with all links to this repository replaced."""
    slug = url.removeprefix("https://github.com/")
    for pattern, replacement in LINKS.items():
        text = re.sub(pattern, replacement.format(url=url, slug=slug, branch=BRANCH), text)
    return text


def linked_files() -> list[Path]:
    """Return the files that may link to the repository."""
    documents = [
        path for folder in ("slm_jax", "tokenizer", "configs", "tests") for path in (ROOT / folder).rglob("*.md")
    ]
    return sorted(
        [
            ROOT / "pyproject.toml",
            *ROOT.glob("*.md"),
            *(ROOT / ".github").glob("*.md"),
            *(ROOT / ".github").glob("*.cff"),
            *(ROOT / "notebooks").glob("*.md"),
            *(ROOT / "notebooks").glob("*.ipynb"),
            *documents,
        ]
    )


def read(path: Path) -> str:
    """Return the text of a file with its line ends unchanged."""
    return path.read_bytes().decode("utf-8")


if __name__ == "__main__":
    sys.exit(main())
