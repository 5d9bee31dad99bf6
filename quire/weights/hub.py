"""Finds a model's folder: a folder as it is, `quire-tiny` inside the package, or a Hugging Face hub id (downloaded once)."""

from __future__ import annotations

import re
from pathlib import Path

from quire import envs
from quire.errors import ModelError

EMBEDDED = Path(__file__).parent.parent / "embedded"
# huggingface_hub passes on the errors of the client that it has, which changes between its releases.
NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TEXT_FILES = (".json", ".txt", ".model", ".jinja")


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of `model`. weights=False: its small files are enough (tokenizer, plan).

    Raises ModelError that says what was looked for and where.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if (EMBEDDED / model / "config.json").is_file():
        return EMBEDDED / model
    if not HUB_ID.fullmatch(model):
        raise ModelError(f"model {model!r} is neither a folder nor a hub id (owner/name).")
    return _download(model, revision, weights)


def _download(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def cached(reason: str) -> Path:
        try:
            return Path(snapshot_download(model, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ModelError(
                f"model {model!r} is not a local folder, is not in the hub's cache, and {reason}. "
                "Give a folder, or 'quire-tiny' for the model that comes with Quire."
            ) from None

    if envs.offline():
        return cached("HF_HUB_OFFLINE is set")
    try:
        names = [entry.rfilename for entry in HfApi().model_info(model, revision=revision).siblings or []]
        return Path(snapshot_download(model, revision=revision, allow_patterns=_wanted(names, weights)))
    except GatedRepoError:
        raise ModelError(f"model {model!r} is gated: accept its licence on the hub and set HF_TOKEN.") from None
    except RevisionNotFoundError:
        raise ModelError(f"model {model!r} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        raise ModelError(f"model {model!r} does not exist on the hub (or needs HF_TOKEN).") from None
    except (HfHubHTTPError, OSError) as error:
        return cached(f"the hub cannot be reached ({type(error).__name__})")
    except Exception as error:
        if type(error).__module__.split(".")[0] in NETWORK_PACKAGES:
            return cached(f"the hub cannot be reached ({type(error).__name__})")
        raise


def _wanted(names: list[str], weights: bool) -> list[str]:
    """Top-level files only (repositories keep other formats in sub-folders), and one format of weights."""
    top = [name for name in names if "/" not in name]
    wanted = [name for name in top if name.endswith(TEXT_FILES)]
    if weights:
        safe = [name for name in top if name.endswith(".safetensors")]
        wanted += safe or [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]
    return wanted
