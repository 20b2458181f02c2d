"""The state of a build of a corpus, in progress.json of its folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_jax.data.corpus.corpus import SPLITS
from slm_jax.data.corpus.plan import SplitPlan
from slm_jax.data.corpus.splitting import SourceCounts
from slm_jax.data.corpus.writing import write_json


@dataclass
class BuildProgress:
    """The state of a build on disk; saved after each shard.

    Attributes:
        plan: The plan of the source.
        sample_items: Number of items in the sample.
        position: The position of the reader after the last shard; None: the build restarts at the beginning.
        version: The version of the source.
        counts: Statistics of the source, see `SourceCounts.to_json`.
        shards: The manifest's entries of the shards written, by split.
        done: Whether all shards are written.
        marked: Whether the corpus has conversations, whose ids have marks.
    """

    plan: SplitPlan
    sample_items: int = 0
    position: Any = None
    version: str = ""
    counts: dict[str, Any] = field(default_factory=lambda: SourceCounts().to_json())
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    done: bool = False
    marked: bool = False

    def save(self, folder: Path) -> None:
        """Write progress.json."""
        content = {**vars(self), "plan": self.plan.to_json(), "head": self.sample_items}
        del content["sample_items"]
        if not self.marked:
            del content["marked"]
        write_json(folder / "progress.json", content)

    @classmethod
    def load(cls, folder: Path) -> "BuildProgress | None":
        """Read progress.json; return None if the folder has no build."""
        try:
            saved = json.loads((folder / "progress.json").read_text())
            plan = SplitPlan.from_json(saved.pop("plan"))
            return cls(plan, saved.pop("head"), **saved)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def total(self, split: str, quantity: str) -> int:
        """Return the tokens, documents, bytes, prompts or turns of a split."""
        return sum(shard[quantity] for shard in self.shards[split])
