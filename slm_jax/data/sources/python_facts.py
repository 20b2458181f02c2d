"""Facts about the names of Python's standard library that programs use most: purpose, arguments, result and module.

The names are listed here; what is said about them comes from the docstrings and signatures of the installed Python.
"""

import builtins
import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from slm_jax.utils.errors import UserError

MAX_PURPOSE = 90  # characters of a sentence
_MAX_ARGUMENTS = 40  # characters
_MIN_SENTENCE = 12  # characters

# Names by module, or by built-in class; "" are the built-in functions, classes and exceptions.
_NAMES = {
    "": "abs all any ascii bin callable chr compile delattr dir divmod enumerate eval exec float getattr globals "
    "hasattr hash hex id input isinstance issubclass iter len list locals max min next object oct open ord print repr "
    "reversed round setattr sorted sum tuple vars zip ArithmeticError AttributeError Exception FileExistsError "
    "FileNotFoundError ImportError IndexError KeyError KeyboardInterrupt LookupError NameError OSError OverflowError "
    "PermissionError RuntimeError StopIteration TypeError UnicodeError ValueError ZeroDivisionError",
    "str": "capitalize casefold center count encode endswith find index isalnum isalpha isascii isdigit islower "
    "isspace isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rjust rsplit rstrip "
    "split splitlines startswith strip swapcase title translate upper zfill",
    "list": "append clear copy count extend index insert pop remove reverse sort",
    "dict": "fromkeys get items keys popitem setdefault values",
    "set": "add difference discard intersection isdisjoint issubset issuperset symmetric_difference union update",
    "math": "acos asin atan ceil comb copysign cos cosh degrees dist erf exp fabs fmod fsum gamma gcd isclose isfinite "
    "isinf isnan isqrt lcm log10 log2 perm prod radians sin sinh sqrt tan tanh trunc",
    "random": "choice choices gauss getrandbits randbytes randint random randrange sample seed shuffle uniform",
    "statistics": "fmean geometric_mean mean median median_high median_low mode multimode pstdev quantiles stdev "
    "variance",
    "time": "ctime gmtime localtime monotonic perf_counter process_time sleep strftime strptime time time_ns",
    "datetime": "timedelta timezone tzinfo",
    "os": "access chdir chmod cpu_count getcwd getenv getpid getppid kill link listdir makedirs mkdir remove rename "
    "rmdir scandir stat symlink system truncate umask unlink urandom walk",
    "os.path": "abspath basename commonprefix dirname exists expanduser expandvars getatime getctime getmtime getsize "
    "isabs isdir isfile islink ismount join lexists normpath relpath split splitdrive splitext",
    "shutil": "copy copy2 copyfile copymode copytree disk_usage make_archive move rmtree unpack_archive",
    "glob": "escape glob",
    "fnmatch": "filter fnmatch translate",
    "tempfile": "NamedTemporaryFile TemporaryDirectory TemporaryFile gettempdir mkdtemp mkstemp",
    "pathlib": "Path PurePath",
    "json": "dumps JSONDecoder JSONEncoder",
    "csv": "Sniffer get_dialect list_dialects register_dialect",
    "pickle": "dump dumps load loads PickleError PicklingError UnpicklingError",
    "copy": "copy deepcopy",
    "re": "compile escape findall finditer purge subn Match Pattern",
    "textwrap": "TextWrapper dedent fill indent shorten wrap",
    "difflib": "HtmlDiff get_close_matches ndiff restore",
    "itertools": "accumulate combinations compress count cycle dropwhile filterfalse pairwise permutations tee",
    "functools": "cache lru_cache singledispatch cmp_to_key total_ordering",
    "operator": "concat contains countOf indexOf truth",
    "collections": "Counter OrderedDict UserDict UserString namedtuple",
    "heapq": "heapify heappop heappush heappushpop merge nlargest nsmallest",
    "bisect": "bisect_left bisect_right insort_left insort_right",
    "queue": "Empty Full LifoQueue PriorityQueue Queue",
    "threading": "Barrier BoundedSemaphore Condition Event Semaphore Thread active_count current_thread main_thread",
    "subprocess": "CompletedProcess Popen call check_output getoutput run",
    "sys": "exc_info exit getdefaultencoding getrecursionlimit getrefcount getsizeof intern setrecursionlimit",
    "io": "BytesIO StringIO TextIOWrapper BufferedReader BufferedWriter",
    "logging": "FileHandler Formatter LogRecord StreamHandler basicConfig disable getLogger shutdown",
    "secrets": "randbelow token_bytes token_hex token_urlsafe",
    "base64": "b16decode b16encode b32decode b32encode b64decode b64encode",
    "html": "escape unescape",
    "shlex": "join quote split",
    "gzip": "compress decompress open",
    "zipfile": "ZipFile ZipInfo is_zipfile",
    "zlib": "adler32 crc32 decompressobj compressobj",
    "urllib.parse": "parse_qs parse_qsl unquote urlencode urlunparse",
    "contextlib": "ExitStack closing contextmanager nullcontext redirect_stdout suppress chdir",
    "dataclasses": "astuple dataclass field fields is_dataclass make_dataclass replace",
    "inspect": "cleandoc currentframe getdoc getmembers getmodule getsource isclass isfunction ismethod ismodule "
    "signature stack",
    "traceback": "extract_stack format_exc format_exception print_exc print_stack",
    "warnings": "filterwarnings resetwarnings simplefilter warn",
    "enum": "Enum IntEnum StrEnum auto unique",
    "abc": "ABC ABCMeta abstractmethod",
    "decimal": "Decimal getcontext setcontext",
    "struct": "calcsize iter_unpack unpack",
    "socket": "create_connection gethostname getfqdn",
    "platform": "machine processor release system uname version",
    "getpass": "getpass getuser",
    "timeit": "Timer timeit repeat",
    "pprint": "pformat pprint saferepr",
    "unicodedata": "category lookup name normalize",
    "uuid": "UUID uuid1 uuid3 uuid4 uuid5",
    "ast": "dump get_docstring literal_eval parse",
    "dis": "dis disassemble show_code",
    "asyncio": "create_task gather run sleep wait wait_for Event Lock Queue Task",
    "argparse": "ArgumentParser HelpFormatter Namespace",
    "configparser": "ConfigParser NoSectionError NoOptionError",
    "unittest": "SkipTest TestCase TestResult TestSuite skip skipIf skipUnless",
}

_SIGNATURE = re.compile(r"[\w.]+\([^ ]*.* -+> |[\w.]+\([\w\[]")  # before a docstring: find(sub[, start]) -> int
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


class Fact(NamedTuple):
    """The documented facts about a name; fields that are not known are empty.

    Attributes:
        name: The full name, as in `os.path.join`.
        module: Its module; empty for built-in names and their methods.
        kind: module, class or function (methods included).
        purpose: A sentence.
        arguments: The signature without parentheses; None if not known.
        returns: A sentence.
        unique: True if no other name that is listed here has the same last part.
    """

    name: str
    module: str
    kind: str
    purpose: str
    arguments: str | None = None
    returns: str = ""
    unique: bool = False

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


@cache
def facts() -> tuple[Fact, ...]:
    """Return all facts in a fixed order.

    Raises:
        UserError: This Python has no docstrings (python -OO).
    """
    counts = Counter(name for names in _NAMES.values() for name in names.split())
    result = []
    for owner, names in _NAMES.items():
        is_class = isinstance(getattr(builtins, owner, None), type)
        home = getattr(builtins, owner) if is_class else importlib.import_module(owner or "builtins")
        module = "" if is_class else owner
        if module and (purpose := sentence(inspect.getdoc(home) or "")):
            result.append(Fact(owner, "", "module", purpose))
        for name in names.split():
            value = getattr(home, name, None)  # a name may be missing in this version of Python
            if value is not None and (purpose := sentence(inspect.getdoc(value) or "")):
                result.append(_fact(f"{owner}.{name}".lstrip("."), module, value, purpose, counts[name] == 1))
    if not result:
        raise UserError("this Python has no docstrings (python -OO removes them): python-chat has nothing to say")
    return tuple(result)


def _fact(name: str, module: str, value: Any, purpose: str, unique: bool) -> Fact:
    if isinstance(value, type):
        return Fact(name, module, "class", purpose, unique=unique)
    verb, _, rest = purpose.partition(" ")
    returns = f"It returns {rest}" if verb in ("Return", "Returns") else ""
    return Fact(name, module, "function", purpose, _arguments(value), returns, unique)


def exists(name: str) -> bool:
    """Return True if a name is that of a module, a built-in name, or an attribute of one that is listed here.

    The last part of a listed name also exists without its module, since questions ask which module contains it.
    """
    owner, _, last = name.rpartition(".")
    if not owner and name in _last_parts():
        return True
    if name in _NAMES or hasattr(builtins, name) or name.partition(".")[0] in sys.stdlib_module_names - set(_NAMES):
        return True
    if owner and hasattr(builtins, owner):
        return hasattr(getattr(builtins, owner), last)
    return owner in _NAMES and hasattr(importlib.import_module(owner or "builtins"), last)


@cache
def _last_parts() -> frozenset[str]:
    return frozenset(last for names in _NAMES.values() for last in names.split())


def owners() -> Iterator[str]:
    """Yield the modules and built-in classes that facts are about."""
    return (owner for owner in _NAMES if owner)


def sentence(docstring: str) -> str:
    """Return the first sentence of a docstring on one line, without a signature; empty if it does not suit."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in docstring.strip().split("\n\n")]
    if _SIGNATURE.match(paragraphs[0]):
        del paragraphs[0]
    text = paragraphs[0] if paragraphs else ""
    match = _SENTENCE.match(text)
    text = match[0] if match else f"{text}."
    unsuitable = "->" in text or "(C)" in text or text.endswith(("e.g.", "i.e.", "a.k.a.", ":.")) or not text.isascii()
    if unsuitable or not _MIN_SENTENCE <= len(text) <= MAX_PURPOSE or " " not in text:
        return ""
    return text[0].upper() + text[1:]


def _arguments(value: Any) -> str | None:
    """Return the parameters of a function without annotations; None if they are not known or too long."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    bare = (each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values())
    text = str(inspect.Signature([each for each in bare if each.name != "self"]))[1:-1]
    text = text.removeprefix("/, ") if text != "/" else ""
    if "<" in text or len(text) > _MAX_ARGUMENTS:  # defaults such as <object object at 0x…> differ between processes
        return None
    return text
