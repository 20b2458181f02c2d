"""Hugging Face model folders: export of runs and import of weights, see README.md."""
