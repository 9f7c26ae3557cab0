"""The finished model on the hub."""

from pathlib import Path

from alignkit.config.hub import HubConfig
from alignkit.errors import ResourceError, first_line


def push_model(folder: Path, hub: HubConfig) -> str:
    """Upload a run's `model/`, card and all, and return its address.

    Token and endpoint are huggingface_hub's own (HF_TOKEN or `hf auth login`, HF_ENDPOINT).
    ResourceError where the hub cannot be reached, refuses, or has a public repository of that name
    where a private one is asked for; the run's folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(hub.push, private=hub.private, exist_ok=True)
        if hub.private and not api.repo_info(repository.repo_id).private:
            raise ResourceError(f"{repository.repo_id} exists and is public; set hub.private=false")
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="Trained with alignkit",
        )
    except Exception as error:  # requests', the hub's and the disk's, one as good as another
        raise ResourceError(
            f"hub.push: {hub.push} was not pushed: {first_line(error).rstrip('.')}. The run is whole in "
            f"{folder.parent}; repeat the command with --resume auto to push it again"
        ) from error
    return str(repository)
