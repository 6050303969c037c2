"""Downloads a diffusers folder of FLUX from the Hugging Face hub into the hub's cache.

`huggingface_hub` reuses the files in the cache, resumes interrupted downloads, and handles the
token (`hf auth login`, or HF_TOKEN) and the location of the cache (HF_HOME).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jitjax.checkpoint import PARTS, TEXT_ENCODERS, TOKENIZERS

from ..components import COMPONENTS

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str) -> bool:
    """Whether `name` has the form owner/repository and does not exist as a path."""
    return bool(REPOSITORY.fullmatch(name)) and not Path(name).exists()


def file_patterns(parts: Sequence[str] = PARTS) -> list[str]:
    """Return glob patterns of the files to download for the models `parts`.

    They exclude the original release's single files, which repositories have in their root.
    """
    folders = [component.folder for component in COMPONENTS if component.name in parts]
    weights = [f"{folder}/*.{suffix}" for folder in folders for suffix in ("safetensors", "json")]
    # `FluxConfig` has the configurations of all models; only text encoders need tokenizers.
    configs = [f"{component.folder}/config.json" for component in COMPONENTS]
    pattern = "*" if set(parts) & set(TEXT_ENCODERS) else "*config.json"
    tokenizers = [f"{name}/{pattern}" for name in TOKENIZERS]
    return ["model_index.json", "scheduler/*.json", *configs, *weights, *tokenizers]


def fetch(repository: str, parts: Sequence[str] = PARTS) -> Path:
    """Download a repository, if the local cache does not have it.

    Args:
        repository: for example "black-forest-labs/FLUX.1-dev".
        parts: names of the models to download, of `jitjax.checkpoint.PARTS`.

    Returns:
        The folder of the repository in the local cache.

    Raises:
        ConnectionError: the hub cannot be reached and files are missing in the cache, or the
            download fails.
        PermissionError: the repository is gated.
        FileNotFoundError: the repository does not exist, or the token gives no access to it.
    """
    from huggingface_hub import errors, get_token, snapshot_download

    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(repository, allow_patterns=file_patterns(parts)))
    except errors.GatedRepoError as error:
        login = "" if get_token() else "log in with `hf auth login`, "
        raise PermissionError(
            f"{repository} is gated; {login}accept its licence at {page}, then run this again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        access = (
            "your token gives no access to it"
            if get_token()
            else "it is private and needs a token (`hf auth login` sets one)"
        )
        raise FileNotFoundError(
            f"repository {repository} does not exist on the hub, or {access}; see {page}"
        ) from error
    except (errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise ConnectionError(
            f"{repository} is not in the local cache, and the hub cannot be reached (offline, or "
            "HF_HUB_OFFLINE is set); downloaded files are kept. A local folder works without the "
            "hub"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(
            f"the download of {repository} failed ({str(error).splitlines()[0]}); downloaded files "
            "are kept, and the same command resumes the download"
        ) from error
