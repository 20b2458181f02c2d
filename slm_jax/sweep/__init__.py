"""Sweeps: the same training with other values of some options, several seeds each, and a table of the scores."""
