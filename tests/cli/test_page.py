"""report.html and accuracy of real jobs, looked at with a real browser where there is one."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgpu_ddp.report import main, rebuild
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.starting import BIN, SMALL_IMAGES, committed_rows, python_m, run, started, torchrun, wait_until

DOCS = Path(__file__).parents[2] / "docs" / "report.md"
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a job over hostile names, which left `out` and, killed and resumed, `again`."""
    cwd = tmp_path_factory.mktemp("page")
    make_images(cwd / "photos", 120, classes=8)
    hostile = cwd / "photos" / "class0" / f"0 {SCRIPT} \u202egnp.\n.jpg"
    (cwd / "photos" / "class1" / "image 0001.jpg").rename(hostile)
    (cwd / "photos" / "class0" / "1 \"><img src=x onerror='alert(3)'>.jpg").write_bytes(b"no image")
    (cwd / "names.txt").write_text("\n".join(NAMES) + "\n")
    ended = run(torchrun(2, *settings("out")), cwd)
    assert ended.code == 0, ended.err
    assert "could not be made" not in ended.err
    return cwd


def settings(out: str) -> list[str]:
    data = ["data=folder", "data.root=photos", "model.class_names=names.txt"]
    return [*SMALL_IMAGES, *data, f"output.dir={out}", "output.commit_every=8"]


def plain_accuracy(run_dir: Path) -> dict[str, Any]:
    """Top-1, top-5 and rows by label, by a plain loop over the rows: class folder i is class i of the model."""
    rows = [row for row in read_rows(run_dir) if row["error"] is None and row["label"] < 6]
    of = {label: [row for row in rows if row["label"] == label] for label in range(6)}
    return {
        "compared": len(rows),
        "top1": sum(row["pred"] == row["label"] for row in rows) / len(rows),
        "top5": sum(row["label"] in row["topk_index"] for row in rows) / len(rows),
        "per_class": {f"class{label}": len(found) for label, found in of.items()},
    }


def assert_accuracy(found: dict[str, Any], per_class: list[dict[str, Any]], run_dir: Path) -> None:
    plain = plain_accuracy(run_dir)
    assert {key: found[key] for key in ("compared", "top1", "top5")} == {
        k: plain[k] for k in ("compared", "top1", "top5")
    }
    assert {row["name"]: row["rows"] for row in per_class} == plain["per_class"]


def test_names_and_accuracy_are_those_of_a_plain_loop(finished: Path) -> None:
    run_dir = finished / "out"
    assert_proved(run_dir, 121, errors=1)
    assert all(row["pred_name"] == NAMES[row["pred"]] for row in read_rows(run_dir) if row["error"] is None)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert "2 folders are not compared" in metrics["accuracy"]["how"]
    assert_accuracy(metrics["accuracy"], metrics["accuracy_per_class"], run_dir)


def test_accuracy_is_exact_after_a_kill(finished: Path) -> None:
    command = python_m(*settings("again"))
    with started(command, finished) as process:
        wait_until(lambda: committed_rows(finished / "again") >= 24, process)
    before = committed_rows(finished / "again")
    assert before < 121
    ended = run(command, finished)
    assert ended.code == 0, ended.err
    metrics = json.loads((finished / "again" / "metrics.json").read_text())
    assert metrics["rows_this_run"] == 121 - before
    assert_accuracy(ended.summary["accuracy"], metrics["accuracy_per_class"], finished / "again")
    assert metrics["accuracy"] == json.loads((finished / "out" / "metrics.json").read_text())["accuracy"]


def test_the_page_is_whole_and_nothing_in_it_runs(finished: Path) -> None:
    text = (finished / "out" / "report.html").read_text()
    page = Reader(text)
    assert len(text) < 2_000_000
    for heading in (
        *("Throughput over time", "Time per stage", "Accuracy", "Predicted classes", "Confidence", "Samples"),
        *("Errors", "What ran where", "Bottleneck: ", "121 of 121"),
    ):
        assert heading in page.text
    assert "0 <script>alert(1)< \ufffdgnp.\ufffd.jpg" in page.text
    assert "1 \"><img src=x onerror='alert(3)'>.jpg" in page.text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "form", "a"}
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 24
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key == "style"]
    assert "default-src 'none'" in text.split("<title>")[0]
    assert not re.search(r"https?://", text)


def test_the_page_is_made_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = finished / "out" / "report.html"
    before = page.read_text()
    page.unlink()
    (finished / "photos").rename(finished / "elsewhere")
    monkeypatch.chdir(finished)
    rebuild(["run=out"])
    assert "<img" not in page.read_text(), "the images are gone"
    (finished / "elsewhere").rename(finished / "photos")
    rebuild(["run=out"])
    assert page.read_text() == before


def test_the_recipe_runs(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 12)
    recipes = re.findall(r"<!-- recipe -->\n```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(recipes) == 1
    # As it stands, but for a model that is large for this.
    small = " ".join(setting for setting in SMALL_IMAGES if not setting.startswith("model.num_classes"))
    recipe = recipes[0].replace("mgpu-infer", f"mgpu-infer {small}")
    (tmp_path / "recipe").write_text(f"set -eu\nPATH={BIN}:$PATH\n{recipe}")
    ended = run(["bash", "recipe"], tmp_path)
    assert ended.code == 0, ended.err
    assert ended.summary == {"report": str(tmp_path / "out" / "report.html")}
    assert "class folders and classes of the same name, 3 of them" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", "["),
        ("metrics.json", '{"ranks": [{}]}'),
        ("status.json", "[1]"),
        ("classes.json", "{}"),
        ("manifest.json", '{"fingerprint": {}, "start": 0, "stop": 1, "batch_size": 1, "parts": []}'),
        ("listing.arrow", "no"),
        ("predictions", ""),
    ],
)
def test_a_folder_that_was_spoiled_is_refused_in_one_line(
    finished: Path,
    tmp_path: Path,
    file: str,
    content: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    if file == "predictions":
        next((tmp_path / "out" / "predictions").iterdir()).write_bytes(b"")
    else:
        (tmp_path / "out" / file).write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", f"run={tmp_path / 'out'}"])
    if file == "listing.arrow":
        main()
        assert "<img" not in (tmp_path / "out" / "report.html").read_text()
        return
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert re.fullmatch(r"mgpu_ddp: .* must .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("argument", ["run=nowhere", "run=photos", "out", "run="])
def test_what_is_no_run_folder_is_refused(
    finished: Path, argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setattr(sys, "argv", ["report", argument])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert re.fullmatch(r"mgpu_ddp: run must be .*\n", capsys.readouterr().err)
    assert not (finished / "nowhere").exists()


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_a_browser_has_no_complaint(finished: Path, tmp_path: Path, look: str) -> None:
    assert BROWSER is not None
    width = 390 if look == "phone" else 1100
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path}", f"--window-size={width},900", f"--screenshot={tmp_path / 'page.png'}"]
    if look != "light":
        options.append("--blink-settings=preferredColorScheme=0")
    ended = subprocess.run(
        [BROWSER, *options, f"file://{finished / 'out' / 'report.html'}"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in ended.stderr
    corner = Image.open(tmp_path / "page.png").convert("RGB").getpixel((2, 2))
    assert corner == ((255, 255, 255) if look == "light" else (13, 17, 23))
