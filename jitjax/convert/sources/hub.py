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
from .file_kinds import WEIGHT_SUFFIXES
from .other_models import first_names

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str) -> bool:
    """Whether `name` has the form owner/repository and is no path.

    What exists, has the suffix of a weight file, or is in a folder that exists, is a path.
    """
    path = Path(name)
    return (
        bool(REPOSITORY.fullmatch(name))
        and not (path.exists() or path.is_symlink() or path.parent.is_dir())
        and path.suffix.lower() not in WEIGHT_SUFFIXES
    )


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
        FileNotFoundError: the repository does not exist, the token gives no access to it, or it is
            no diffusers folder.
    """
    from huggingface_hub import errors, get_token, snapshot_download

    page = f"https://huggingface.co/{repository}"
    try:
        folder = Path(snapshot_download(repository, allow_patterns=file_patterns(parts)))
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
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(_explain_single_files(repository, folder))
    return folder


def _explain_single_files(repository: str, folder: Path) -> str:
    """Say that a repository is no diffusers folder, and which weight files it has.

    Args:
        repository: its name.
        folder: its snapshot in the cache, whose files are listed if the hub cannot be reached.
    """
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(repository)
    except Exception:  # only for the message; HTTP clients raise errors of many types
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    files = [name for name in names if Path(name).suffix.lower() in WEIGHT_SUFFIXES]
    example = files[0] if files else "FILE"
    listed = f" ({first_names(files)})" if files else ""
    return (
        f"{repository} is no diffusers folder (it has no model_index.json) but a repository of "
        f"single files{listed}; fetch one with `hf download {repository} {example} --local-dir .` "
        "and give that file"
    )
