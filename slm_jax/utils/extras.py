"""Installation of optional packages: the extras of pyproject.toml."""


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, in a clone of the repository."""
    return f"pip install -e '.[{extra}]'"
