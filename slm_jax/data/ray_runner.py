"""Prepare the parts of a corpus as tasks of Ray (https://docs.ray.io), on one machine or a cluster."""

import logging
import os
import tomllib
from pathlib import Path
from typing import Any

from slm_jax.config.schema import Config
from slm_jax.data.corpus.part_files import Part
from slm_jax.data.learning import weighted_sources
from slm_jax.data.prepare import find_tokenizer, prepare_part
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import import_optional

logger = logging.getLogger(__name__)


def prepare_parts(config: Config, count: int, tokenizer_path: str = "") -> None:
    """Prepare all parts of a config's sources, each as a task of Ray with as many cores as `data.workers` (default 1).

    The cluster is that of the environment variable RAY_ADDRESS, or the one that runs on this machine, or else Ray is
    started here for the time of the call. Its machines need this package and the folders of text and cache under the
    same paths. A task whose machine is lost is run again by Ray, and resumes.

    Args:
        config: The options `data` and `tokenizer`.
        count: The number of parts.
        tokenizer_path: Path or name of the tokenizer; empty: learn one.

    Raises:
        UserError: Ray is not installed or does not start, or a part cannot be prepared.
    """
    ray = import_optional("ray", "--ray", extra="ray")
    find_tokenizer(config, tokenizer_path, weighted_sources(config))  # once, before the tasks need it
    workers = config.data.workers or 1
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
        except Exception as error:  # Ray raises exceptions of many kinds
            raise UserError(f"Ray does not start: {error}") from None
    try:
        task = ray.remote(num_cpus=workers)(_prepare)
        arguments = (config.to_toml(), tokenizer_path, str(Path.cwd()))
        pending = [task.remote(number, count, *arguments) for number in range(1, count + 1)]
        for done in range(1, count + 1):
            ready, pending = ray.wait(pending)
            if problem := _result(ray, ready[0]):
                raise UserError(problem)
            logger.info("%d of %d parts are prepared", done, count)
    finally:
        if started:
            ray.shutdown()


def _result(ray: Any, task: Any) -> str:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return f"Ray: {' '.join(str(error).split())}; what was prepared is kept: run the same command again"


def _prepare(number: int, count: int, config: str, tokenizer_path: str, folder: str) -> str:
    """Prepare a part in a process of Ray; return the message of an error, "" if there is none."""
    os.chdir(folder)  # paths of the config may be relative to it
    try:
        prepare_part(Config.from_tree(tomllib.loads(config)), Part(number, count), tokenizer_path)
    except UserError as error:
        return str(error)
    return ""
