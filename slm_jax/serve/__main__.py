"""The command line `python -m slm_jax.serve`."""

from slm_jax.errors import command_line

if __name__ == "__main__":
    with command_line():
        from slm_jax.serve.command import main

        main()
