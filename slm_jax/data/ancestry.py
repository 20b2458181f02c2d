"""The runs that the initial weights of a run come from, whose text counts as trained on."""

from slm_jax.config.schema import Config
from slm_jax.run.directory import Run, find_run
from slm_jax.utils.errors import UserError


def runs_of_weights(config: Config) -> tuple[list[Run], str]:
    """Return the runs that the initial weights of a config come from, directly or through others.

    Args:
        config: The option `init.from_run`; that of each run found is followed in turn.

    Returns:
        The runs that have their text, the nearest first, and why there are no more; empty if these are all.
    """
    runs: list[Run] = []
    while config.init.from_run:
        try:
            run = find_run(config.init.from_run)
            if any(run.path.resolve() == other.path.resolve() for other in runs):
                break
            if not (run.corpus / "manifest.json").is_file():
                return runs, f"{run.path} has no text"
            runs.append(run)
            config = run.read_config()
        except UserError as error:
            return runs, str(error)
    return runs, ""
