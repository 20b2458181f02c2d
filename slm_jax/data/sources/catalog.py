"""The named data sets of the Hugging Face hub."""

from typing import NamedTuple

from slm_jax.chat.formats import named_format
from slm_jax.config.source_names import parse_hub_name
from slm_jax.data.sources.rows import ConversationMapper, Mapper, RowMapper
from slm_jax.data.sources.threads import THREADS
from slm_jax.utils.errors import UserError


class HubDataset(NamedTuple):
    """A data set of the hub.

    Attributes:
        repo: OWNER/NAME.
        description: Content and size, for `python -m slm_jax.data list`.
        config: The configuration; `{}` stands for what follows the name (wikipedia:he). Empty: the only one.
        default_config: Used for `{}` if nothing follows the name.
        split: The split to train on.
        mapper: The mapping of rows to documents.
        rows_are_lines: Rows are lines, and an article begins with the line ` = Title = ` (WikiText).
    """

    repo: str
    description: str
    config: str = ""
    default_config: str = ""
    split: str = "train"
    mapper: Mapper = RowMapper()
    rows_are_lines: bool = False


CATALOG = {
    "tinystories": HubDataset("roneneldan/TinyStories", "2.1 M short stories in a small child's vocabulary, 1.9 GB"),
    "wikitext": HubDataset(
        "Salesforce/wikitext",
        "29,000 good Wikipedia articles, 540 MB",
        "{}",
        "wikitext-103-raw-v1",
        rows_are_lines=True,
    ),
    "wikitext-2": HubDataset(
        "Salesforce/wikitext", "600 of these articles, 11 MB", "{}", "wikitext-2-raw-v1", rows_are_lines=True
    ),
    "openwebtext": HubDataset("Skylion007/openwebtext", "8 M web pages linked from Reddit, 40 GB"),
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "educational web pages, 10 G tokens", "{}", "sample-10BT"),
    "cosmopedia": HubDataset("HuggingFaceTB/cosmopedia", "synthetic textbooks, articles and stories", "{}", "stories"),
    "wikipedia": HubDataset(
        "wikimedia/wikipedia", "wikipedia:LANG, all articles in a language", "20231101.{}", "simple"
    ),
    "alpaca": HubDataset(
        "yahma/alpaca-cleaned",
        "52,000 instructions with responses, 40 MB",
        mapper=RowMapper(template="alpaca", response_column="output"),
    ),
    "dolly": HubDataset(
        "databricks/databricks-dolly-15k",
        "15,000 instructions with responses written by people, 13 MB",
        mapper=RowMapper(template="alpaca", response_column="response", aliases=(("input", "context"),)),
    ),
    "smoltalk": HubDataset(
        "HuggingFaceTB/smoltalk",
        "1.0 M conversations, most of them synthetic, 2.0 GB compressed; smoltalk:CONFIG for a part",
        "{}",
        "all",
        mapper=ConversationMapper(named_format("messages")),
    ),
    "oasst": HubDataset(
        "OpenAssistant/oasst2",
        "conversations written by people in many languages, the best thread of each message tree",
        mapper=ConversationMapper(THREADS),
    ),
}


def find_dataset(name: str) -> HubDataset:
    """Return the data set of a name.

    Args:
        name: A name of the catalog, NAME:CONFIG, or hf:OWNER/NAME[:CONFIG][:SPLIT].

    Raises:
        UserError: The name is none of these.
    """
    first, _, rest = name.partition(":")
    if first in CATALOG:
        dataset = CATALOG[first]
        if rest and not dataset.config:
            raise UserError(f"data.source {name}: {first} has no configurations to choose from")
        return dataset._replace(config=dataset.config.format(rest or dataset.default_config))
    repo, config, split = parse_hub_name(name)
    return HubDataset(repo, "", config, split=split or "train", mapper=RowMapper(detects=True))
