"""A run, or several, as a page to be looked at: `python -m slm_jax.report`."""
