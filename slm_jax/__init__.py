"""slm_jax: from raw text to a trained, measured, usable small language model in JAX."""

__version__ = "0.1.0"
