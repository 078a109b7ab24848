"""What the numbers in `pred` and `label` stand for, and which label means which class of the model."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.data.listing import FILE_NAME, Listing, readable
from mgpu_ddp.errors import UsageError
from mgpu_ddp.output.atomic_files import replace_json
from mgpu_ddp.output.manifest import Manifest

CLASSES = "classes.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """The classes of a model beside those of a dataset."""

    num_classes: int
    names: tuple[str, ...] | None
    """Of the model's classes."""
    label_names: tuple[str, ...] | None
    """Of the dataset's, where folders are classes."""
    num_labels: int | None
    """None where a label is the number that the dataset itself gives."""

    def write(self, run_dir: Path) -> None:
        replace_json(run_dir / CLASSES, asdict(self))

    def name(self, number: int) -> str:
        return self.names[number] if self.names and 0 <= number < len(self.names) else f"class {number}"

    def label_name(self, number: int) -> str:
        if self.label_names and 0 <= number < len(self.label_names):
            return self.label_names[number]
        return str(number) if self.num_labels is not None else self.name(number)

    def compare(self) -> tuple[npt.NDArray[np.int64] | None, str]:
        """(int64 (labels,): the class that each label means, or -1; in words what is compared with what).

        Without an array, labels cannot be compared, and the words say why.
        """
        if self.num_labels is None:
            return np.arange(self.num_classes), "a label is the number of a class of the model"
        if self.names and self.label_names:
            counts = Counter(map(_plain, self.names))
            numbers = {_plain(name): i for i, name in enumerate(self.names) if counts[_plain(name)] == 1}
            class_of = np.array([numbers.get(_plain(name), -1) for name in self.label_names], dtype=np.int64)
            known = int((class_of >= 0).sum())
            if known:
                rest = len(class_of) - known
                lacking = f"; {rest:,} folders are not compared, no class has their name alone" if rest else ""
                return class_of, f"class folders and classes of the same name, {known:,} of them{lacking}"
        if self.num_labels == self.num_classes:
            order = "folders in the order of their names" if self.label_names else "labels in their order"
            return np.arange(self.num_classes), f"{order} and classes in the model's"
        named = "no name in common" if self.names and self.label_names else "no names on both sides"
        return None, f"{self.num_labels:,} classes of the data and {self.num_classes:,} of the model, {named}"


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def find_classes(run_dir: Path, manifest: Manifest, names: tuple[str, ...] | None) -> Classes:
    """The classes of a job, given those names that its model has. Rank 0 only."""
    job = manifest.fingerprint
    label_names: tuple[str, ...] | None = None
    num_labels: int | None = job.get("data.num_classes")
    if job.get("data.name") == "folder":
        numbers = Listing.open(run_dir / FILE_NAME).classes()
        label_names = tuple(readable(name) for name in sorted(numbers, key=lambda name: numbers[name]))
        num_labels = len(label_names)
    num_classes = int(job["model.num_classes"])
    return Classes(num_classes=num_classes, names=names, label_names=label_names, num_labels=num_labels)


def read_classes(run_dir: Path, manifest: Manifest) -> Classes:
    """The classes that a finished job has left in its folder.

    Raises:
        UsageError: the file is not one of ours.
    """
    path = run_dir / CLASSES
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        lists = {key: tuple(map(str, found[key])) if found[key] else None for key in ("names", "label_names")}
        return Classes(**{**found, **lists})
    except FileNotFoundError:
        return find_classes(run_dir, manifest, None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} must be readable, got {type(error).__name__}. Delete it and try again.") from None
