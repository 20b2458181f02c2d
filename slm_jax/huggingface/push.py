"""Upload of an exported folder to the Hugging Face hub, with the library `huggingface_hub`."""

import re
from pathlib import Path
from typing import Any

from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import import_optional

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Files of an earlier upload of the same format that would be loaded together with the new ones.
_REPLACED = {"transformers": ["*.safetensors", "*.safetensors.index.json"], "gguf": ["*.gguf"]}


class Hub:
    """A repository of models on the hub, whose access is verified before the work that precedes an upload."""

    def __init__(self, repository: str, private: bool = False):
        """Verify the name and the access token, without writing anything.

        Args:
            repository: OWNER/NAME.
            private: Create the repository as a private one; an existing public one is refused.

        Raises:
            UserError: An invalid name, no or a refused access token, one that may not write, an existing public
                repository with `private`, an unreachable hub, or `huggingface_hub` is missing.
        """
        if not _REPOSITORY.fullmatch(repository) or len(repository) > 96:
            raise UserError(f"--push {repository}: give OWNER/NAME, of letters, digits, '-', '_' and '.'")
        huggingface_hub = import_optional("huggingface_hub", "--push", extra="hub")
        self._repository = repository
        self._private = private
        self._api = huggingface_hub.HfApi()
        try:
            token = self._api.whoami().get("auth", {}).get("accessToken", {})
            is_public = private and self._api.repo_exists(repository) and not self._api.model_info(repository).private
        except Exception as error:
            raise UserError(f"--push {repository}: {_reason(error)}") from None
        if token.get("role") == "read":
            raise UserError(f"--push {repository}: the access token may only read: use one that may write")
        if is_public:
            raise UserError(
                f"--push {repository}: the repository exists and is public: make it private on the hub first, or leave "
                "out --private"
            )

    def upload(self, folder: Path, title: str) -> str:
        """Upload the files of a folder; other weights of its format in the repository are deleted.

        Args:
            folder: A folder that an export wrote.
            title: The message of the commit.

        Returns:
            The address of the repository.

        Raises:
            UserError: The hub refuses the upload or cannot be reached. The folder stays as it is.
        """
        kind = "gguf" if any(folder.glob("*.gguf")) else "transformers"
        try:
            url = self._api.create_repo(self._repository, private=self._private or None, exist_ok=True)
            self._api.upload_folder(
                repo_id=self._repository,
                folder_path=folder,
                commit_message=title,
                delete_patterns=_REPLACED[kind],
            )
        except Exception as error:
            raise UserError(
                f"{self._repository} was not uploaded: {_reason(error)}. The export in {folder} is complete: "
                f"hf upload {self._repository} {folder}"
            ) from None
        return str(url)


def _reason(error: Exception) -> str:
    """Return cause and remedy of an error of the library in one line."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if type(error).__name__ == "LocalTokenNotFoundError":
        return "no access token: run `hf auth login`, or set HF_TOKEN to one that may write"
    if status == 401:
        return "the hub refuses the access token: run `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return "the access token may not write there: use one with write access to this owner"
    text = " ".join(str(error).split()).rstrip(".")
    if (status is None and isinstance(error, OSError | ConnectionError)) or "onnect" in type(error).__name__:
        return f"the hub cannot be reached ({text[:200]})"
    return text[:300] or type(error).__name__
