"""`from slm_jax import train` gives the module of the command `python -m slm_jax.train`, and it can be called.

A package cannot hold a function and a module of one name; a module that can be called is both.
"""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(name: str) -> None:
    """Let calling the module `a.b` call its function `b`."""
    sys.modules[name].__class__ = _CallableModule
