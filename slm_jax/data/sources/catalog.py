"""The hub's data sets that have a name here."""

from typing import NamedTuple

from slm_jax.data.sources.documents import RowMapper
from slm_jax.utils.errors import UserError


class HubDataset(NamedTuple):
    """A data set of the hub. config: its configuration; `{}` stands for what follows the name (wikipedia:he)."""

    repo: str
    about: str
    config: str = ""
    default: str = ""  # for `{}`
    split: str = "train"
    columns: RowMapper = RowMapper()
    lines: bool = False  # rows are lines, of which an article begins with " = Title = "


CATALOG = {
    "tinystories": HubDataset("roneneldan/TinyStories", "2.1 M short stories in the words of a small child, 1.9 GB"),
    "wikitext": HubDataset(
        "Salesforce/wikitext", "29,000 good Wikipedia articles, 540 MB", "{}", "wikitext-103-raw-v1", lines=True
    ),
    "wikitext-2": HubDataset("Salesforce/wikitext", "600 of them, 11 MB", "{}", "wikitext-2-raw-v1", lines=True),
    "openwebtext": HubDataset("Skylion007/openwebtext", "8 M web pages that people linked to, 40 GB"),
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "educational web pages, 10 G tokens", "{}", "sample-10BT"),
    "cosmopedia": HubDataset("HuggingFaceTB/cosmopedia", "synthetic textbooks, articles and stories", "{}", "stories"),
    "wikipedia": HubDataset(
        "wikimedia/wikipedia", "wikipedia:LANG, all articles of a language", "20231101.{}", "simple"
    ),
    "alpaca": HubDataset(
        "yahma/alpaca-cleaned",
        "52,000 instructions with responses, 40 MB",
        columns=RowMapper(template="alpaca", response="output"),
    ),
    "dolly": HubDataset(
        "databricks/databricks-dolly-15k",
        "15,000 instructions with responses by people, 13 MB",
        columns=RowMapper(template="alpaca", response="response", also=(("input", "context"),)),
    ),
}


def find_dataset(name: str) -> HubDataset:
    """The data set of a name: one of the catalogue's, also NAME:CONFIG, or hf:OWNER/NAME[:CONFIG][:SPLIT].

    Raises UserError for what is neither.
    """
    first, _, rest = name.partition(":")
    if first in CATALOG:
        found = CATALOG[first]
        if rest and not found.config:
            raise UserError(f"data.source {name}: {first} has no configurations to choose from")
        return found._replace(config=found.config.format(rest or found.default))
    repo, config, split, *more = [*rest.split(":"), "", ""]
    if first != "hf" or repo.count("/") != 1 or not all(repo.split("/")) or any(more):
        raise UserError(f"data.source {name}: a data set of the hub is written hf:OWNER/NAME[:CONFIG][:SPLIT]")
    return HubDataset(repo, "", config, split=split or "train")
