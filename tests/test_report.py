"""The page of a real job, in a real browser where there is one, and `mgpu_ddp.report`, which writes it again."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model

import mgpu_ddp
from mgpu_ddp.config.schema import ITSELF, ScriptDataConfig, ScriptModelConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.report import main, rebuild
from mgpu_ddp.reporting.provenance import provenance
from mgpu_ddp.reporting.text import duration
from tests.support.runs import assert_proved, make_images, read_rows, recipes
from tests.support.starting import BIN, SMALL_IMAGES, run
from tests.support.worlds import folder, run_job, tiny

SCRIPT = "<script>alert(1)<"
NAMES = [*(f"class{i}" for i in range(6)), "</title><script>alert(2)</script>", *(f"<img src=x{i}>" for i in range(5))]
BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)


class Reader(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def predict(root: Path, name: str, world: World, **changes: Any) -> dict[str, Any]:
    """Run a job over the images of `root` and return its summary."""
    model = {"class_names": str(root / "names.txt")}
    config = tiny(data=folder(root / "photos"), model=model, output={"commit_every": 8}, **changes)
    return run_job(config, root / name, world)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A folder with images and class names, both with hostile names, and the run folder `out` of a job over them."""
    root = tmp_path_factory.mktemp("page")
    make_images(root / "photos", 120, classes=8)
    hostile = root / "photos" / "class0" / f"0 {SCRIPT} \u202egnp.\n.jpg"
    (root / "photos" / "class1" / "image 0001.jpg").rename(hostile)
    (root / "photos" / "class0" / "1 \"><img src=x onerror='alert(3)'>.jpg").write_bytes(b"no image")
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    assert predict(root, "out", world)["status"] == "complete"
    return root


def assert_accuracy(metrics: dict[str, Any], run_dir: Path) -> None:
    """Equal to a plain loop over the rows: class folder i is class i of the model, for the first six."""
    rows = [row for row in read_rows(run_dir) if row["error"] is None and row["label"] < 6]
    accuracy = metrics["accuracy"]
    assert "2 labels not compared" in accuracy["how"]
    assert accuracy["compared"] == len(rows)
    assert accuracy["top1"] == sum(row["pred"] == row["label"] for row in rows) / len(rows)
    assert accuracy["top5"] == sum(row["label"] in row["topk_index"] for row in rows) / len(rows)
    labels = [row["label"] for row in rows]
    expected = {f"class{label}": labels.count(label) for label in range(6)}
    assert {row["name"]: row["rows"] for row in metrics["accuracy_per_class"]} == expected


def test_names_and_accuracy_are_those_of_a_plain_loop(root: Path) -> None:
    run_dir = root / "out"
    assert_proved(run_dir, 121, errors=1)
    assert all(row["pred_name"] == NAMES[row["pred"]] for row in read_rows(run_dir) if row["error"] is None)
    assert_accuracy(json.loads((run_dir / "metrics.json").read_text()), run_dir)


def test_accuracy_and_time_are_those_of_all_starts(
    root: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = predict(root, "again", world, max_errors=0)
    assert 0 < stopped["rows"] < 121
    assert "in all" not in capsys.readouterr().out
    ended = predict(root, "again", world)
    said = capsys.readouterr().out
    # This process may be old.
    this, both = duration(ended["wall_s"]), duration(ended["all_starts"]["wall_s"])
    assert re.search(rf"^in all: {both}, 121 rows, [0-9.,]+ images/s with start-up, over 2 starts$", said, re.MULTILINE)
    assert re.search(rf"^this start: {this}, ", said, re.MULTILINE)
    metrics = json.loads((root / "again" / "metrics.json").read_text())
    assert metrics["rows_this_run"] == 121 - stopped["rows"]
    assert ended["all_starts"] == metrics["all_starts"]
    assert (ended["all_starts"]["starts"], ended["all_starts"]["rows"]) == (2, 121)
    assert ended["all_starts"]["wall_s"] == pytest.approx(ended["wall_s"] + stopped["wall_s"], rel=0.2)
    assert ended["accuracy"] == metrics["accuracy"]
    assert_accuracy(metrics, root / "again")
    text = (root / "again" / "report.html").read_text()
    assert "time of all 2 starts" in text
    assert "<h2>Starts</h2>" in text
    idle = predict(root, "again", world)
    assert idle["all_starts"] == ended["all_starts"], "nothing was left to do"
    assert "over 2 starts" in capsys.readouterr().out


def test_the_page_is_whole_and_nothing_in_it_runs(root: Path) -> None:
    text = (root / "out" / "report.html").read_text()
    page = Reader(text)
    assert len(text) < 2_000_000
    for heading in (
        *("Throughput over time", "Time per stage", "Accuracy", "Predicted classes", "Confidence", "Samples"),
        *("Errors", "What ran where", "Bottleneck: ", "121 of 121", "Samples by predicted class", "What produced"),
    ):
        assert heading in page.text
    assert "0 <script>alert(1)< \ufffdgnp.\ufffd.jpg" in page.text
    assert "1 \"><img src=x onerror='alert(3)'>.jpg" in page.text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"iframe", "object", "form", "a"}
    assert [tag for tag, _ in page.tags].count("script") == 1
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == [attributes.get("class") for _, attributes in page.tags].count("thumb")
    assert len(images) > 24
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key == "style"]
    assert "default-src 'none'" in text.split("<title>")[0]
    assert not re.search(r"https?://", text)


def test_the_face_in_a_notebook_says_the_same(root: Path) -> None:
    page, face = ((root / "out" / "report.html").read_text(), mgpu_ddp.open(root / "out")._repr_html_())
    manifest = Manifest.read(root / "out")
    assert manifest is not None
    for words in provenance(manifest).values():
        assert f"<bdi>{words}</bdi>" in page
        assert f"<bdi>{words}</bdi>" in face
    cards = re.findall(r"<td>(.*?)</td>", face)
    assert cards == re.findall(r'<div class="card">.*?<b>(.*?)</b></div>', page)
    assert "121 of 121" in cards


def test_the_page_is_written_again(root: Path) -> None:
    page = root / "out" / "report.html"
    before = page.read_text()
    page.unlink()
    (root / "photos").rename(root / "elsewhere")
    rebuild(root / "out")
    assert "<img" not in page.read_text(), "the images are gone"
    assert "images can no longer be read" in page.read_text()
    (root / "elsewhere").rename(root / "photos")
    rebuild(root / "out")
    assert page.read_text() == before


@pytest.mark.slow
def test_the_recipe_runs(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 12)
    (tmp_path / "photos" / "notes.txt").write_text("beside the folders of classes")
    (recipe,) = recipes("report")
    # As it stands, but for a model that is large for this.
    small = " ".join(setting for setting in SMALL_IMAGES if not setting.startswith("model.num_classes"))
    torch.save(get_model("squeezenet1_1", weights=None, num_classes=3).state_dict(), tmp_path / "mine.pt")
    recipe = recipe.replace("mgpu-infer", f"mgpu-infer {small}")
    (tmp_path / "recipe").write_text(f"set -eu\nPATH={BIN}:$PATH\n{recipe}")
    ended = run(["bash", "recipe"], tmp_path)
    assert ended.code == 0, ended.err
    assert ended.summary == {"report": str(tmp_path / "out" / "report.html")}
    assert "labels with classes of the same name, 3 of them" in (tmp_path / "out" / "report.html").read_text()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line that the command prints where it leaves with 2."""
    monkeypatch.setattr(sys, "argv", ["report", *argv])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"mgpu_ddp: .*\n", said)
    return said


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "[", "metrics.json cannot be read"),
        ("metrics.json", '{"ranks": [{}]}', "is damaged"),
        ("status.json", "[1]", "status.json cannot be read"),
        ("classes.json", "{}", "classes.json cannot be read"),
        (
            "manifest.json",
            '{"fingerprint": {"output.format": "csv"}, "start": 0, "stop": 1, "batch_size": 1, "parts": []}',
            "is damaged",
        ),
        ("predictions", "", ""),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    root: Path,
    tmp_path: Path,
    file: str,
    content: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(root / "out", tmp_path / "out")
    damaged = tmp_path / "out" / file
    damaged = next(damaged.iterdir()) if damaged.is_dir() else damaged
    damaged.write_text(content)
    assert message in refused(monkeypatch, capsys, f"run={tmp_path / 'out'}")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("by", ["link", "pipe"])
@pytest.mark.parametrize(
    "file",
    [
        *(".lock", "manifest.json", "status.json", "metrics.json", "classes.json", "errors.jsonl", "listing.arrow"),
        *("predictions", "report.html"),
    ],
)
def test_a_hostile_folder_is_refused_in_one_line(
    root: Path, tmp_path: Path, file: str, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "out", tmp_path / "out")
    path, victim = tmp_path / "out" / file, tmp_path / "victim"
    path.rename(victim)
    if by == "link":
        path.symlink_to(victim)
    else:
        os.mkfifo(path)
    before = victim.read_bytes() if victim.is_file() else b""
    assert f"'{file}' is not a " in refused(monkeypatch, capsys, f"run={tmp_path / 'out'}")
    assert (victim.read_bytes() if victim.is_file() else b"") == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_classes", 10**18),
        ("model.num_classes", -1),
        ("data.name", []),
        ("output.fields", 3),
    ],
)
def test_a_manifest_of_impossible_values_is_refused_in_one_line(
    root: Path,
    tmp_path: Path,
    key: str,
    value: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out/classes.json").unlink()
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    manifest.fingerprint[key] = value
    manifest.write(tmp_path / "out")
    refused(monkeypatch, capsys, f"run={tmp_path / 'out'}")


def test_a_page_without_its_listing_has_no_images(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out" / "listing.arrow").write_text("no")
    assert "<img" not in rebuild(tmp_path / "out").read_text()


def test_what_is_no_run_folder_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "mgpu_ddp: run must be a folder with a manifest.json or a sweep.json, got "
    assert refused(monkeypatch, capsys, f"run={root / 'photos'}").startswith(line)


def test_a_folder_whose_name_is_not_utf8_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "out", tmp_path / "caf\udce9")
    assert "run must be UTF-8" in refused(monkeypatch, capsys, "run=" + str(tmp_path / "caf\udce9"))


def test_a_page_that_is_made_in_haste_has_no_empty_boxes(
    root: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgpu_ddp.reporting.page.THUMBNAILS_S", 0.0)
    predict(root, "hasty", world)
    page = Reader((root / "hasty" / "report.html").read_text())
    assert "samples left out, to save time" in page.text
    assert "Samples by predicted class" not in page.text
    assert not [attributes for _, attributes in page.tags if "thumb" in (attributes.get("class") or "").split()]


def test_a_page_stays_small_whatever_names_there_are(
    root: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images whose thumbnails are large, and quotes in names, each of which becomes five characters."""
    random, folders = np.random.default_rng(0), [tmp_path / "photos" / (f"{i:02d}" + 200 * '"') for i in range(12)]
    for i in range(240):
        folder_of = folders[i % 12] / (200 * '"') / (200 * '"')
        folder_of.mkdir(parents=True, exist_ok=True)
        path = folder_of / f"{i}.png"
        if i % 3:
            Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(path)
        else:
            path.write_bytes(b"no image")
    shutil.copy(root / "names.txt", tmp_path / "names.txt")
    predict(tmp_path, "out", world)
    page = tmp_path / "out" / "report.html"
    assert 400_000 < page.stat().st_size < 2_000_000
    monkeypatch.setattr("mgpu_ddp.reporting.page.MAX_BYTES", 400_000)
    rebuild(tmp_path / "out")
    assert page.stat().st_size < 400_000
    assert "<h2>Errors</h2>" in page.read_text()


class Scans(torch.utils.data.Dataset[dict[str, Any]]):
    """Model input with keys, and a number with each."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"image": image, "key": f"scan <{index}>", "age": 20.0 + index}


class Ages(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        means = images.mean(dim=(1, 2, 3))
        return {"bone_age": means, "spread": torch.stack([means - 1, means + 1], dim=1)}


def test_the_page_of_a_model_without_classes_shows_keys_and_columns(tmp_path: Path, world: World) -> None:
    config = tiny(data=ScriptDataConfig(), model=ScriptModelConfig(), transform={"name": ITSELF})
    run_job(config, tmp_path / "out", world, Script(model=Ages, dataset=Scans))
    page = Reader((tmp_path / "out" / "report.html").read_text())
    assert [tag for tag, _ in page.tags].count("img") == len(Scans())
    assert "scan <0>" in page.text
    assert re.search(r"age 20\s.*bone_age -?\d.*spread -?\d.*, -?\d", page.text, re.DOTALL)
    assert "the dataset yields model input of 1 × 8 × 8" in page.text


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")
@pytest.mark.parametrize("look", ["light", "dark phone"])
def test_a_browser_has_no_complaint(root: Path, tmp_path: Path, look: str) -> None:
    assert BROWSER is not None
    width = 1100 if look == "light" else 390
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={tmp_path}", f"--window-size={width},900", f"--screenshot={tmp_path / 'page.png'}"]
    if look != "light":
        options.append("--blink-settings=preferredColorScheme=0")
    page = root / "out" / "report.html"
    ended = subprocess.run([BROWSER, *options, f"file://{page}"], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in ended.stderr
    options.append("--dump-dom")
    dumped = subprocess.run([BROWSER, *options, f"file://{page}"], capture_output=True, text=True, timeout=120).stdout
    assert '<p class="filter">' in dumped, "the filter shows itself once its script has run"
    corner = Image.open(tmp_path / "page.png").convert("RGB").getpixel((2, 2))
    assert corner == ((255, 255, 255) if look == "light" else (13, 17, 23))
