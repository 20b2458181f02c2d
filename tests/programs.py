"""Compiled programs that the processes which tests start have in common: compiling is most of their time."""

PROGRAMS = "SLM_JAX_TEST_PROGRAMS"
"""The environment variable that names the folder; set by conftest.py, for this process's own workers too."""
