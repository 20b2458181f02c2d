"""Installation of optional packages: the extras of pyproject.toml."""


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, and where to run it."""
    return f"pip install -e '.[{extra}]' (in a clone of slm_jax)"
