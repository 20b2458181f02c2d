"""The Hugging Face layout, out and in: config.json, safetensors, the tokenizer as a module, the model card.

architecture.py          config.json <-> model.*
weights.py               tensors <-> parameters
tokenization_slm_jax.py  the tokenizer as `transformers` wants it; bundle.py puts it into one file with what it needs
card.py                  README.md of an exported model
"""
