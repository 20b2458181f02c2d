"""The kind of text that a run was trained on: conversations, or plain text."""

import json

from slm_jax.run.directory import Run


def is_chat_trained(run: Run) -> bool:
    """Return whether a run was trained on conversations: its corpora name the chat template that encoded them."""
    for manifest in run.corpus.rglob("manifest.json"):
        try:
            if "chat_template" in json.loads(manifest.read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError):
            continue
    return False
