"""Flags of the installed XLA."""

import importlib.util
import mmap
from pathlib import Path


def is_known_flag(flag: str) -> bool:
    """Return whether the installed jaxlib has a flag, such as `--xla_dump_to=/tmp`.

    The names of flags are C strings, between two zero bytes. Names of removed flags may remain as those of fields.
    """
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        return False
    name = flag.lstrip("-").partition("=")[0].encode()
    library = Path(spec.origin).parent / "libjax_common.so"
    if not library.is_file():
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"\0" + name + b"\0") >= 0
