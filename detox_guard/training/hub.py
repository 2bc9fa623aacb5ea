"""What comes from the hub and goes to it: public comments to train on, and a finished detoxifier.

Knows one data set, Civil Comments (CC0), and which files of a folder are the detoxifier's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard.detoxifiers.soft_prompt import CARD_FILE, WEIGHTS_FILE
from detox_guard.errors import DataError, DetoxGuardError
from detox_guard.models.checks import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["COMMENTS", "LICENCE", "fetch_comments", "push"]

COMMENTS = "google/civil_comments"
LICENCE = "CC0-1.0"
TOXIC_TO_MOST, TOXIC_TO_FEW = 0.66, 0.1
"""Shares of the raters who called a comment toxic."""
CHARS = (20, 160)
"""Shortest and longest comment that is taken: what is learned of one is a reply's length of it."""


def fetch_comments(count: int, progress: Callable[[int], object] = lambda found: None) -> tuple[list[str], list[str]]:
    """The first `count` toxic and `count` harmless comments of a fitting length, read as a stream, so that little more
    is fetched. `progress` hears how many there are. Raises `DataError` where the hub cannot be reached, or where it
    has fewer."""
    toxic: list[str] = []
    harmless: list[str] = []
    try:
        import datasets

        for row in datasets.load_dataset(COMMENTS, split="train", streaming=True):
            text, share = str(row["text"]).strip(), float(row["toxicity"])
            kind = toxic if share >= TOXIC_TO_MOST else harmless if share <= TOXIC_TO_FEW else None
            if kind is None or len(kind) == count or not CHARS[0] <= len(text) <= CHARS[1]:
                continue
            kind.append(text)
            progress(len(toxic) + len(harmless))
            if len(toxic) == len(harmless) == count:
                break
    except ImportError:
        raise
    except Exception as error:  # the library has no common root for what a fetch can raise
        raise DataError(
            f"{COMMENTS}: cannot be fetched: {error}",
            hint="with --data and --anchors, files of toxic and of harmless texts, no hub is needed",
        ) from error
    if min(len(toxic), len(harmless)) < count:
        raise DataError(
            f"{COMMENTS}: only {len(toxic)} toxic and {len(harmless)} harmless comments, {count} of each asked"
        )
    return toxic, harmless


def push(folder: Path, repo_id: str) -> str:
    """Put the detoxifier in `folder` and its README.md on the hub as `org/name`; its address there.

    Raises `DetoxGuardError` where the hub refuses, or cannot be reached.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        address = str(api.create_repo(repo_id, exist_ok=True))
        wanted = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, "README.md"]
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=wanted)
    except Exception as error:  # no token, no right, no network: the library has no common root for them
        raise DetoxGuardError(
            f"{repo_id}: not put on the hub: {error}",
            hint="log in with `hf auth login`; the detoxifier is made, and the same command tries again",
        ) from error
    return address
