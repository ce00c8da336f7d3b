"""An export on the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from lit_alignment.errors import ConfigError
from lit_alignment.paths import look_for_hub

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_push(repo: str) -> None:
    """Refuse, before anything is computed, what could not be pushed.

    Args:
        repo: Name on the hub.

    Raises:
        ConfigError: If that is no name, the hub cannot be reached, or nobody is logged in.
    """
    if HUB_NAME.fullmatch(repo) is None:
        raise ConfigError(f"--push-to-hub {repo}: no name on the hub. Write ACCOUNT/NAME.")
    if reason := look_for_hub():
        raise ConfigError(f"--push-to-hub {repo}: {reason}. Export without it, and push the folder from elsewhere.")
    if get_token() is None:
        raise ConfigError(f"--push-to-hub {repo}: nobody is logged in. Run `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a folder as one commit, into a repository that is made if there is none.

    Args:
        folder: The export.
        repo: Name on the hub.
        private: Whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: If the hub refuses it; the folder stays.
    """
    api = HfApi(endpoint=constants.ENDPOINT, library_name="lit_alignment")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Export {folder.name}")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise _refused(folder, repo, error) from error
    except Exception as error:  # of a connection; which package raises it depends on the hub client's version
        if not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise _refused(folder, repo, error) from error
    return str(commit.commit_url)


def _refused(folder: Path, repo: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(
        f"--push-to-hub {repo}: not pushed ({reason}). The export is in {folder}; later: hf upload {repo} {folder}"
    )
