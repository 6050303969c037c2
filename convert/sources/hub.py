"""Fetches a diffusers folder of FLUX from the Hugging Face hub, into the hub's own cache.

Files that are there already are not fetched again, and a download that was stopped goes on where it
was: both are `huggingface_hub`'s doing, as are the token (`hf auth login`, or HF_TOKEN) and the
cache's place (HF_HOME).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jitjax.checkpoint import PARTS, TEXT_ENCODERS, TOKENIZERS

from ..components import COMPONENTS

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str) -> bool:
    """Whether a source is no path, and may be a repository (black-forest-labs/FLUX.1-dev)."""
    return bool(REPOSITORY.fullmatch(name)) and not Path(name).exists()


def wanted_files(parts: Sequence[str] = PARTS) -> list[str]:
    """Patterns of the files needed; the single files beside the folders are left out."""
    folders = [c.folder for c in COMPONENTS if c.name in parts]
    weights = [f"{folder}/*.{ending}" for folder in folders for ending in ("safetensors", "json")]
    # The configurations are needed of all models, the tokenizers where there are text encoders.
    configs = [f"{component.folder}/config.json" for component in COMPONENTS]
    pattern = "*" if set(parts) & set(TEXT_ENCODERS) else "*config.json"
    tokenizers = [f"{name}/{pattern}" for name in TOKENIZERS]
    return ["model_index.json", "scheduler/*.json", *configs, *weights, *tokenizers]


def fetch(repository: str, parts: Sequence[str] = PARTS) -> Path:
    """The folder of a repository in the local cache, fetched if need be.

    Raises:
        ConnectionError: the hub cannot be reached, and not all is in the cache.
        PermissionError: the repository is gated, or needs a token.
        FileNotFoundError: there is no such repository.
    """
    from huggingface_hub import errors, get_token, snapshot_download

    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted_files(parts)))
    except errors.GatedRepoError as error:
        step = "" if get_token() else "log in with `hf auth login`, "
        raise PermissionError(
            f"{repository} is gated: {step}accept its licence at {page}, then run this again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        token = "your token" if get_token() else "no token (`hf auth login` sets one)"
        raise FileNotFoundError(
            f"the hub has no repository {repository}, or not for {token}; see {page}"
        ) from error
    except (errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise ConnectionError(
            f"{repository} is not in the local cache, and the hub cannot be reached (offline, or "
            f"HF_HUB_OFFLINE is set); what was fetched before is kept. A folder on disk works "
            "without the hub"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(
            f"fetching {repository} broke off ({str(error).splitlines()[0]}); what was fetched is "
            "kept, and the same command goes on from there"
        ) from error
