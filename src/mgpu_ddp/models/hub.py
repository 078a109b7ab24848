"""Files of one repository by their names: of a folder, of the Hugging Face hub's cache, or of the hub itself.

Nothing of a repository is ever run: its files are read by us, as JSON and as tensors.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from mgpu_ddp.data.input_file import open_value
from mgpu_ddp.errors import UsageError, cause_of
from mgpu_ddp.models.network import REACH_S, within

log = logging.getLogger("mgpu_ddp")

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
CONVERT = (
    "python -c \"import torch, safetensors.torch as s; w = torch.load('pytorch_model.bin', weights_only=True);"
    " s.save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors')\""
)
MOST_JSON = 1 << 24
"""Bytes. The names of ImageNet's 21,000 classes take 2 million."""


class Repository:
    """A repository, or a folder that holds the files of one. All files are of the first one's commit."""

    def __init__(self, key: str, value: str, name: str, *, folder: Path | None = None) -> None:
        """Take ORG/REPO or ORG/REPO@REVISION as its name; `key` and `value` are what the user gave for it.

        Raises:
            UsageError: the revision is none.
        """
        self.name, at, revision = name.partition("@")
        self.revision = revision or None
        """The commit, once there is a file of it."""
        self._key, self._value, self._folder = key, value, folder
        if folder is None and not (re.fullmatch(r"[\w./-]+", revision) and ".." not in revision if at else True):
            raise self.refused("ORG/REPO or ORG/REPO@REVISION", f"the revision {revision!r}", "Correct it.")

    def get(self, file: str) -> Path | None:
        """A file on this machine, downloaded if need be; None where the repository has no such file.

        Raises:
            UsageError: there is no such repository, it may not be read, or the hub does not answer.
        """
        from huggingface_hub import hf_hub_download

        if self._folder is not None:
            return self._in_folder(file)
        found = self._cached(file)
        if found is None and self._is_on_hub(file):
            log.info("%s goes to the cache of the Hugging Face hub", self._url(file))
            try:
                found = hf_hub_download(self.name, file, revision=self.revision)
            except Exception as error:  # the hub's own, those of its HTTP client, and OSError
                raise self._out_of_reach(file, error) from None
        if not isinstance(found, str):
            return None
        self.revision = Path(found).parent.name
        return Path(found)

    def read_json(self, file: str) -> dict[str, Any] | None:
        """The object in a JSON file; None where the repository has no such file.

        Raises:
            UsageError: as `get`, or the file is too large or holds something else.
        """
        path = self.get(file)
        if path is None:
            return None
        with open_value(self._key, path) as opened:
            data = opened.read(MOST_JSON + 1)
        try:
            if len(data) > MOST_JSON:
                raise ValueError(f"more than {MOST_JSON:,} bytes")
            value = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
            if not isinstance(value, dict):
                raise ValueError(f"{type(value).__name__} at its top")
        except (ValueError, RecursionError) as error:
            why = f"{file}: {cause_of(error)}"
            raise self.refused("one whose JSON files hold an object", why, "Correct it.") from None
        return value

    def without_safetensors(self) -> UsageError:
        """The error of a repository that has no safetensors; says how to convert what it has instead."""
        pickles = [file for file in PICKLES if self._has(file)]
        if pickles:
            remedy = f"Download it, convert it by {CONVERT}, and give the folder."
            return self.refused("one with weights as safetensors", f"it has {pickles[0]} alone", remedy)
        return self.refused("one with weights as safetensors", f"it has no {WEIGHTS}", "Choose another.")

    def refused(self, rule: str, why: str, remedy: str) -> UsageError:
        """The line of a repository that is of no use."""
        return UsageError(f"{self._key} must be {rule}, got {self._value!r} ({why}). {remedy}")

    def _has(self, file: str) -> bool:
        if self._folder is not None:
            return self._in_folder(file) is not None
        found = self._cached(file)
        return self._is_on_hub(file) if found is None else isinstance(found, str)

    def _in_folder(self, file: str) -> Path | None:
        assert self._folder is not None
        if not self._folder.is_dir():
            raise self.refused("a folder", "there is none", "Check the path.")
        self._require_plain(file)
        path = self._folder / file
        return path if os.path.lexists(path) else None

    def _cached(self, file: str) -> Any:
        """The path of a file in the cache; None where it is not known, another object where it does not exist."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        self._require_plain(file)
        try:
            return try_to_load_from_cache(self.name, file, revision=self.revision)
        except HFValidationError as error:
            why = str(error).partition(":")[0]
            raise self.refused("ORG/REPO or ORG/REPO@REVISION", why, "Correct it.") from None

    def _require_plain(self, file: str) -> None:
        # The names of some files stand in others.
        if os.path.basename(file) != file:
            raise self.refused("one whose files lie side by side", f"it names {file!r}", "Correct it.")

    def _is_on_hub(self, file: str) -> bool:
        from huggingface_hub import constants, errors, get_hf_file_metadata

        try:
            if constants.HF_HUB_OFFLINE:
                raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
            within(REACH_S, lambda: get_hf_file_metadata(self._url(file), timeout=REACH_S))
        except errors.EntryNotFoundError:
            return False
        except Exception as error:
            raise self._out_of_reach(file, error) from None
        return True

    def _url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, file, revision=self.revision)

    def _out_of_reach(self, file: str, error: Exception) -> UsageError:
        from huggingface_hub import constants, errors

        status, hub = getattr(getattr(error, "response", None), "status_code", None), constants.ENDPOINT
        why = type(error).__name__ if status is None else f"{status}, {type(error).__name__}"
        if isinstance(error, errors.RevisionNotFoundError):
            return self.refused(f"{self.name} at a revision of it", why, "Correct what follows @.")
        if isinstance(error, errors.GatedRepoError) or status == 403:
            remedy = f"Accept its terms at {hub}/{self.name}, and set HF_TOKEN to a token of yours."
            return self.refused("a repository that you may read", why, remedy)
        if status in (401, 404):
            remedy = "Correct the name, or set HF_TOKEN for one that is private."
            return self.refused(f"a repository at {hub}", why, remedy)
        copied = f"or copy models--{self.name.replace('/', '--')} from its cache to {constants.HF_HUB_CACHE}"
        remedy = f"Fetch {hub}/{self.name} where there is a network and give its folder, {copied}."
        if self._key == "model.weights":
            remedy = (
                f"Fetch {self._url(file)} where there is a network and give its path, {copied}; model.weights=null is"
                " random ones."
            )
        return self.refused("on this machine or reachable", why, remedy)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
