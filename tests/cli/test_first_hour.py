"""The commands of docs/first-hour.md in their order, over a folder of photos as the page describes it."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.heics import PLAIN
from tests.support.runs import ROOT, assert_proved, read_rows, recipes
from tests.support.starting import BIN, run

CLASSES = ("Birnen", "Zitronen & Limetten", "Äpfel")
FILES, LEFT_OUT = 60, 4


def make_photos(root: Path) -> None:
    """Twenty photos of each class, few of them plain JPEGs, and what lies beside photos."""
    random = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True)

        def photo(number: int = number) -> Image.Image:
            pixels = random.integers(0, 120, (4, 5, 3), dtype=np.uint8)
            pixels[..., number] += 100
            return Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC)

        for orientation in (6, 8, 3):
            exif = Image.Exif()
            exif[0x112] = orientation
            photo().save(folder / f"IMG_200{len(list(folder.iterdir()))}.JPG", exif=exif)
        cut_out = photo()
        cut_out.putalpha(200)
        cut_out.save(folder / "cut out 3.png")
        photo().save(folder / "progressiv.jpeg", progressive=True)
        photo().convert("CMYK").save(folder / "druck (CMYK).jpg")
        photo().convert("L").save(folder / "grau.tif")
        photo().convert("P").save(folder / "palette.gif")
        for ending in ("webp", "avif"):
            photo().save(folder / f"4.{ending}")
        (folder / "HEIC from phone.HEIC").write_bytes(PLAIN)
        for i in range(11, 20):
            photo().save(folder / f"{name} Nr. {i} #1, it's = ü.jpg")
    cut = root / "Äpfel" / "Äpfel Nr. 11 #1, it's = ü.jpg"
    (root / "Äpfel" / "cut.jpg").write_bytes(cut.read_bytes()[:900])
    cut.unlink()
    (root / "Birnen" / "Birnen Nr. 11 #1, it's = ü.jpg").rename(root / "Birnen" / "no image.jpg")
    (root / "Birnen" / "no image.jpg").write_bytes(b"oops")
    for other in ("notes.txt", ".DS_Store", "Äpfel/._IMG_2000.JPG", "Birnen/clip.mov"):
        (root / other).write_bytes(b"x")


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    make_photos(tmp_path / "My Photos")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == FILES + LEFT_OUT
    page = (ROOT / "docs" / "first-hour.md").read_text()
    (script,) = re.findall(r"<!-- script -->\n```python\n(.*?)```", page, re.DOTALL)
    # Ten passes make it good; one makes it a checkpoint.
    once = script.replace("range(10)", "range(1)")
    assert once != script
    (tmp_path / "train.py").write_text(once)
    ended = []
    for block in recipes("first-hour"):
        (tmp_path / "block").write_text(f"set -eu\nPATH={BIN}:$PATH\n{block}")
        ended.append(run(["bash", "block"], tmp_path))
        assert ended[-1].code == 0, ended[-1].err
    _, _, killed, continued, looked, *_ = ended
    assert_proved(tmp_path / "first", FILES, errors=2)
    assert_proved(tmp_path / "fruit", FILES)
    said = "".join(each.out + each.err for each in ended)
    # What the page shows, but for what depends on the photos and the time.
    shown = "".join(re.findall(r"\n\n```\n(.*?)```", page, re.DOTALL)).splitlines()
    lasting = [line for line in shown if not re.match(r"predictions|top-1|in all|.* of 60 rows to do", line)]
    assert len(lasting) >= 9
    assert [line for line in lasting if line not in said] == []
    (left,) = re.findall(r"; (\d+) of 60 rows to do", continued.err)
    assert 0 < int(left) < FILES, "it was not killed in between"
    assert "complete" not in killed.out
    assert "cut.jpg" in looked.out
    assert ended[-1].summary["all_starts"]["starts"] == 4
    assert (tmp_path / "fruit" / "report.html").stat().st_size < 2 << 20
    rows = read_rows(tmp_path / "fruit")
    assert all(row["pred_name"] == CLASSES[row["pred"]] for row in rows)
    assert all(row["path"].startswith(f"{CLASSES[row['label']]}/") for row in rows)
