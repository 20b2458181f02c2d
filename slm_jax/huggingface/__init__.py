"""The Hugging Face layout, out and in: config.json, safetensors, the tokenizer as a module, the model card.

architecture.py          config.json <-> model.*
weights.py               tensors <-> parameters
exported/                the tokenizer as `transformers` wants it, never imported here; bundle.py puts it into one file
                         with what it needs
card.py                  README.md of an exported model
"""
