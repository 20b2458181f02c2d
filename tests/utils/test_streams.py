"""Commands run with closed standard streams."""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_closed_streams_are_the_null_device(tmp_path):
    code = "import sys; print(sys.stdin.read(), [sys.stdin.fileno(), sys.stdout.fileno(), sys.stderr.fileno()])"
    (tmp_path / "command.py").write_text(f"def main():\n    {code}\n    open('out', 'w').write('done')\n")
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}, '.']; from slm_jax.cli import run_main; run_main('command')"
    command = f"{shlex.join([sys.executable, '-c', program])} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "out").read_text() == "done"
