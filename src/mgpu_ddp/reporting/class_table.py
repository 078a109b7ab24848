"""The names behind the numbers in `pred` and `label`, and the class of the model that each label stands for."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgpu_ddp.config.schema import num_outcomes
from mgpu_ddp.data.listing import FILE_NAME, Listing, readable
from mgpu_ddp.errors import UsageError, plural
from mgpu_ddp.output.atomic_files import replace_json
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.output.regular_files import read_json

CLASSES = "classes.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassTable:
    """The classes of a model beside the labels of a dataset."""

    num_classes: int
    """0 for a model that returns columns of its own."""
    names: tuple[str, ...] | None
    """The model's class names."""
    label_names: tuple[str, ...] | None
    """The dataset's, where folders are classes or labels are texts."""
    num_labels: int | None
    """None where the dataset itself numbers its labels."""

    def write(self, run_dir: Path) -> None:
        replace_json(run_dir / CLASSES, asdict(self))

    def name(self, number: int) -> str:
        return self.names[number] if self.names and 0 <= number < len(self.names) else f"class {number}"

    def label_name(self, number: int) -> str:
        if self.label_names and 0 <= number < len(self.label_names):
            return self.label_names[number]
        return str(number) if self.num_labels is not None else self.name(number)

    def match(self) -> tuple[npt.NDArray[np.int64] | None, str]:
        """Match labels to classes.

        Returns int64 (labels,): the class that each label stands for, or -1; and the rule, in words. Without an array
        labels and classes cannot be matched, and the words say why.
        """
        if not self.num_classes:
            return None, "the model returns no classes"
        if self.num_labels is None:
            return np.arange(self.num_classes), "labels are class numbers of the model"
        by_name = self._match_names()
        known = 0 if by_name is None else int((by_name >= 0).sum())
        if by_name is not None and known:
            others = plural(len(by_name) - known, "label") + " not compared: no class, or more than one, has that name"
            how = f"labels with classes of the same name, {known:,} of them"
            return by_name, how if known == len(by_name) else f"{how}; {others}"
        if self.num_labels == self.num_classes:
            return np.arange(self.num_classes), "labels in their order with classes in the model's order"
        why = "with no name in common" if by_name is not None else "without names to match them by"
        return None, f"the data has {plural(self.num_labels, 'class')} and the model {self.num_classes:,}, {why}"

    def _match_names(self) -> npt.NDArray[np.int64] | None:
        """int64 (labels,): the only class of the same name, or -1. None where names are missing."""
        if not self.names or not self.label_names:
            return None
        names = [_fold(name) for name in self.names]
        counts = Counter(names)
        numbers = {name: number for number, name in enumerate(names) if counts[name] == 1}
        return np.array([numbers.get(_fold(name), -1) for name in self.label_names], dtype=np.int64)


def _fold(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def find_classes(run_dir: Path, manifest: Manifest, names: tuple[str, ...] | None) -> ClassTable:
    """Look up the classes of a job, whose model names its own. Rank 0 only."""
    job = manifest.fingerprint
    label_names: tuple[str, ...] | None = None
    num_labels: int | None = job.get("data.num_classes")
    files = Listing.open(run_dir / FILE_NAME) if (run_dir / FILE_NAME).exists() else None
    if files is not None and job.get("data.name") == "folder":
        numbers = files.classes()
        label_names = tuple(readable(name) for name in sorted(numbers, key=lambda name: numbers[name]))
    elif files is not None and files.label_names is not None:
        label_names = tuple(files.label_names)
    if label_names is not None:
        num_labels = len(label_names)
    num_classes = num_outcomes(job["model.num_classes"]) if manifest.has_classes else 0
    return ClassTable(num_classes=num_classes, names=names, label_names=label_names, num_labels=num_labels)


def read_classes(run_dir: Path, manifest: Manifest) -> ClassTable:
    """Read the classes from the folder of a finished job.

    Raises:
        UsageError: `classes.json` cannot be read.
    """
    path = run_dir / CLASSES
    try:
        found: dict[str, Any] = read_json(path)
        lists = {key: tuple(map(str, found[key])) if found[key] else None for key in ("names", "label_names")}
        return ClassTable(**{**found, **lists})
    except FileNotFoundError:
        return find_classes(run_dir, manifest, None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}). Delete it and try again.") from None
