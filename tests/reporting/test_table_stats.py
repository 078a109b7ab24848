"""Statistics over all rows equal those of a plain loop, whatever the format and the parts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgpu_ddp.config.schema import FakeConfig
from mgpu_ddp.data.fake import FakeSamples
from mgpu_ddp.data.listing import Listing
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.class_names import read_class_names
from mgpu_ddp.output.formats import FORMATS
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.output.parts import Table, open_writer
from mgpu_ddp.output.rows import Rows
from mgpu_ddp.output.run_folder import RunFolder
from mgpu_ddp.reporting.class_table import ClassTable, find_classes, read_classes
from mgpu_ddp.reporting.picked_rows import EACH, SPREAD, PickedRows
from mgpu_ddp.reporting.table_stats import BINS, TableStats, count_rows
from tests.support.samples import texts

CLASSES, ROWS = 8, 97
FAILED = {3: "ValueError: no", 40: "ValueError: no", 96: "ValueError: no"}
LOGITS = np.random.default_rng(0).standard_normal((ROWS, CLASSES)).astype(np.float32)
ORDER = np.argsort(-LOGITS, axis=1)
LABELS = np.arange(ROWS) % 6 - 1
NAMES = ("cat", "dog", "snow leopard", "crane", "crane", "fox", "owl", "bee")
FOLDERS = ("Dog", "crane", "newt", "snow_leopard", "bee")


class Labelled(FakeSamples):
    def known_label(self, index: int) -> int:
        return int(LABELS[index])


def written(run_dir: Path, how: str, *stops: int, topk: int = 5, classes: int = CLASSES) -> Manifest:
    """A folder with these parts, of the 97 rows."""
    logits = LOGITS[:, :classes]
    order = np.argsort(-logits, axis=1)
    job = {"output.format": how, "output.fields": ["topk"], "output.topk": topk, "model.num_classes": classes}
    manifest = Manifest(fingerprint=job, start=0, stop=ROWS, batch_size=4)
    columns = classes if how == "npy" else None
    with RunFolder.place(run_dir) as folder:
        manifest = folder.claim(
            manifest, None, resume=True, batch_size_given=False, array_shape=None if columns is None else (columns,)
        )
    writer = open_writer(run_dir, how, lambda indices: texts(map(str, indices)), NAMES, "t", 0)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for first, stop in zip((0, *stops), stops, strict=False):
        index = np.arange(first, stop)
        best = order[index, :topk].astype(np.int32)
        columns_of = {
            "pred": best[:, 0],
            "prob": probs[index, best[:, 0]],
            "topk_index": best,
            "topk_prob": np.take_along_axis(probs[index], best, axis=1),
        }
        if how == "npy":
            columns_of["logits"] = logits[index]
        errors = {i: reason for i, reason in FAILED.items() if first <= i < stop}
        rows = Rows(index=index, label=LABELS[index].astype(np.int32), columns=columns_of, errors=errors)
        Table(run_dir, manifest, writer).add(rows)
    return manifest


def named(label_names: tuple[str, ...] | None, num_labels: int | None) -> ClassTable:
    return ClassTable(num_classes=CLASSES, names=NAMES, label_names=label_names, num_labels=num_labels)


def counted(run_dir: Path, manifest: Manifest, classes: ClassTable) -> TableStats:
    return count_rows(run_dir, manifest, classes, Labelled(FakeConfig(size=ROWS)))


@pytest.mark.parametrize("stops", [(97,), (1, 4, 41, 97), (60,)])
@pytest.mark.parametrize("how", [*FORMATS, "npy"])
def test_counts_are_those_of_a_plain_loop(tmp_path: Path, how: str, stops: tuple[int, ...]) -> None:
    meant = {0: 1, 3: 2, 4: 7}
    top1, top5, rows = ([0] * len(FOLDERS) for _ in range(3))
    preds, labelled = [0] * CLASSES, 0
    for i in range(stops[-1]):
        if i in FAILED:
            continue
        preds[ORDER[i, 0]] += 1
        labelled += LABELS[i] >= 0
        if int(LABELS[i]) in meant:
            rows[LABELS[i]] += 1
            top1[LABELS[i]] += ORDER[i, 0] == meant[LABELS[i]]
            top5[LABELS[i]] += meant[LABELS[i]] in ORDER[i, :5]
    manifest = written(tmp_path, how, *stops)
    classes = named(FOLDERS, len(FOLDERS))
    found = counted(tmp_path, manifest, classes)
    assert found.preds.tolist() == preds
    assert found.confidence.sum() == sum(preds)
    assert len(found.confidence) == BINS
    assert found.accuracy is not None
    assert found.accuracy["how"].startswith("labels with classes of the same name, 3 of them; 2 labels not")
    assert (found.accuracy["labelled"], found.accuracy["compared"]) == (labelled, sum(rows))
    assert (found.accuracy["top1"], found.accuracy["top5"]) == (sum(top1) / sum(rows), sum(top5) / sum(rows))
    per_class = {row["name"]: row for row in found.per_class(classes)}
    assert list(per_class) == ["Dog", "snow_leopard", "bee"]
    assert [row["rows"] for row in per_class.values()] == [rows[label] for label in meant]
    assert [row["top5"] for row in per_class.values()] == [top5[label] / rows[label] for label in meant]
    assert_picked(found.picked, stops[-1])


def assert_picked(picked: PickedRows, stop: int) -> None:
    """Equal to a plain loop over the rows."""
    good = [i for i in range(stop) if i not in FAILED]
    wanted = [int(place) for place in np.linspace(0, stop - 1, min(SPREAD, stop))]
    nearest = {min((i for i in good if i >= place), default=None) for place in wanted} - {None}
    assert {row.index for row in picked.spread} <= nearest
    assert len(picked.spread) >= len(nearest) - len(FAILED)
    probs = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    for number in range(CLASSES):
        rows = sorted((i for i in good if ORDER[i, 0] == number), key=lambda i: (-probs[i, ORDER[i, 0]], i))
        most, least = picked.of_class(number)
        assert [row.index for row in most] == rows[:EACH]
        assert [row.index for row in least] == rows[: EACH - 1 : -1][:EACH]
        assert [row.label for row in most] == [LABELS[row.index] for row in most]
        for row in [*most, *least]:
            assert row.prob == pytest.approx(probs[row.index, number], rel=1e-5)


def test_without_five_best_there_is_no_top_5(tmp_path: Path) -> None:
    manifest = written(tmp_path, "parquet", ROWS, topk=4)
    accuracy = counted(tmp_path, manifest, named(FOLDERS, 5)).accuracy
    assert accuracy is not None
    assert accuracy["top1"] > 0
    assert accuracy["top5"] is None


@pytest.mark.parametrize("how", ["parquet", "npy"])
@pytest.mark.parametrize(("num_classes", "has_top5"), [(3, False), (5, False), (6, True)])
def test_there_is_no_top_5_where_any_guess_would_be_among_them(
    tmp_path: Path, how: str, num_classes: int, has_top5: bool
) -> None:
    manifest = written(tmp_path, how, ROWS, classes=num_classes)
    classes = ClassTable(num_classes=num_classes, names=None, label_names=None, num_labels=None)
    found = counted(tmp_path, manifest, classes)
    assert found.accuracy is not None
    assert found.accuracy["top1"] > 0
    assert (found.accuracy["top5"] is not None) == has_top5
    assert all((row["top5"] is not None) == has_top5 for row in found.per_class(classes))


def test_labels_that_mean_no_class_are_not_compared(tmp_path: Path) -> None:
    manifest = written(tmp_path, "jsonl", ROWS)
    found = counted(tmp_path, manifest, named(("ant", "emu", "elk", "yak", "cod"), 5))
    assert found.accuracy is not None
    assert (found.accuracy["compared"], found.accuracy["top1"]) == (0, None)
    assert found.accuracy["how"] == "the data has 5 classes and the model 8, with no name in common"
    assert found.per_class(named(None, 5)) == []


def test_a_folder_without_rows_counts_nothing(tmp_path: Path) -> None:
    found = counted(tmp_path, written(tmp_path, "csv"), named(None, None))
    assert (found.accuracy, found.preds.sum(), found.picked.spread) == (None, 0, [])


def test_labels_mean_nothing_to_a_model_without_classes() -> None:
    for num_labels in (None, 3):
        classes = ClassTable(num_classes=0, names=None, label_names=None, num_labels=num_labels)
        assert classes.match() == (None, "the model returns no classes")


@pytest.mark.parametrize(
    ("label_names", "num_labels", "expected", "how"),
    [
        (None, None, list(range(8)), "labels are class numbers"),
        (NAMES[:2], 2, [0, 1], "same name, 2 of them"),
        (("CRANE", "owl "), 2, [-1, 6], "1 label not compared"),
        (
            ("n01", "n02", "n03", "n04", "n05", "n06", "n07", "n08"),
            8,
            list(range(8)),
            "labels in their order with classes in the model's order",
        ),
        (None, 8, list(range(8)), "labels in their order with classes in the model's"),
        (None, 10, None, "the data has 10 classes and the model 8, without names to match them by"),
    ],
)
def test_what_a_label_means(label_names: Any, num_labels: Any, expected: Any, how: str) -> None:
    class_of, words = named(label_names, num_labels).match()
    assert (class_of if class_of is None else class_of.tolist()) == expected
    assert how in words


def test_classes_come_back_as_written(tmp_path: Path) -> None:
    files = Listing.build([b"a<b>/1.jpg", b"a\xff/2.jpg"])
    (tmp_path / "listing.arrow").write_bytes(bytes(files.buffer))
    job = {"data.name": "folder", "model.num_classes": 2}
    manifest = Manifest(fingerprint=job, start=0, stop=2, batch_size=1)
    classes = find_classes(tmp_path, manifest, ("x", "y"))
    assert (classes.label_names, classes.num_labels) == (("a<b>", r"a\udcff"), 2)
    assert read_classes(tmp_path, manifest).names is None, "a folder from before there was such a file"
    classes.write(tmp_path)
    assert read_classes(tmp_path, manifest) == classes
    (tmp_path / "classes.json").write_text("[")
    with pytest.raises(UsageError, match=r"classes\.json cannot be read \(JSONDecodeError\)"):
        read_classes(tmp_path, manifest)


def test_class_names_from_a_file(tmp_path: Path) -> None:
    lines, listed = tmp_path / "names.txt", tmp_path / "names.json"
    lines.write_bytes("\ufeffcat\r\ndog, big\r\nÖl <b>\r\n".encode())
    listed.write_text(json.dumps(["cat", "dog, big", "Öl <b>"]))
    assert read_class_names(lines, 3) == read_class_names(listed, 3) == ("cat", "dog, big", "Öl <b>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"cat\ndog\n", 'must be a file of 3 names for this model, got "2 in'),
        ("a.txt", b"cat\n\ndog\n", "must be printable names, got \"'' for class 1\""),
        ("a.txt", b"cat\nd\x1b[2Jog\nowl\n", "must be printable names"),
        ("a.json", b'["cat", "dog", "\\udc00"]', "must be printable names"),
        ("a.json", b'{"0": "cat"}', "must be a list of names"),
        ("a.json", b"[1, 2, 3]", "must be a list of names"),
        ("a.json", b"[" * 12_000, "must be a readable text"),
        ("a.txt", b"\xff\xfe\x00", "must be a readable text"),
        ("a.txt", None, "must be a readable file"),
        (
            "a.json",
            b"[" + b"[]," * 5000 + b"[]]",
            'must be a file of at most 12,288 bytes for 3 classes, got "15,004 in',
        ),
    ],
)
def test_names_that_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"^model\.class_names must .*\.$") as refused:
        read_class_names(tmp_path / name, 3)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
