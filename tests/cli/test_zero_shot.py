"""Classes by their embeddings, on two ranks: rows, names, accuracy and the fingerprint."""

import json
from pathlib import Path

import numpy as np
import torch

from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.starting import SMALL_IMAGES, ranks, run
from tests.support.zero_shot import plain, save_classes

NAMES = ("Class1", "CLASS0", "class2", "another")


def test_embeddings_of_classes_make_a_classifier(tmp_path: Path) -> None:
    images = make_images(tmp_path / "photos", 21)
    path, classes = save_classes(tmp_path / "classes, mine.safetensors", width=24, names=NAMES)
    settings = ("data=folder", "data.root=photos", *SMALL_IMAGES[:1], *SMALL_IMAGES[2:])
    settings += ("output.fields=[topk,logits,embedding]", "output.topk=2")
    two = run(ranks(2, *settings, f"model.zero_shot={path.name}", "output.dir=two"), tmp_path)
    assert two.code == 0, two.err
    assert_proved(tmp_path / "two", len(images))
    rows = read_rows(tmp_path / "two")
    features = torch.tensor([row["embedding"] for row in rows])
    logits = torch.tensor([row["logits"] for row in rows])
    assert torch.allclose(plain(features, classes), logits, atol=1e-5)
    assert [row["pred_name"] for row in rows] == [NAMES[i] for i in logits.argmax(1)]
    assert {len(row["topk_index"]) for row in rows} == {2}
    assert json.loads((tmp_path / "two" / "classes.json").read_text())["names"] == [*NAMES]
    # Folders class0, class1 and class2 are the second, the first and the third class.
    right = [row["pred"] == [1, 0, 2][row["label"]] for row in rows]
    assert two.summary["accuracy"]["top1"] == np.mean(right)
    assert two.summary["accuracy"]["compared"] == len(rows)

    one = run(ranks(1, *settings, f"model.zero_shot={path.name}", "output.dir=one"), tmp_path)
    assert one.code == 0, one.err
    assert read_rows(tmp_path / "one") == rows

    save_classes(tmp_path / "other.safetensors", width=24, names=NAMES, seed=1)
    other = run(ranks(2, *settings, "model.zero_shot=other.safetensors", "output.dir=two"), tmp_path)
    assert other.code == 2
    (line,) = [line for line in other.err.splitlines() if "output.dir must hold this same job" in line]
    assert line.count("there, ") == 1
    assert "with model.zero_shot='" in line
    without = run(ranks(1, *settings, "output.dir=two"), tmp_path)
    assert (without.code, "model.zero_shot='" in without.err) == (2, True)


def test_mistakes_are_one_line_before_anything_is_written(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 2)
    save_classes(tmp_path / "c.safetensors", width=24)
    settings = ("data=folder", "data.root=photos", "model.weights=null", "output.dir=out")
    for words, said in (
        (("model.zero_shot=none.safetensors",), "model.zero_shot must be a readable file, got 'none.safetensors'"),
        (("model.zero_shot=",), "model.zero_shot must be null or a file, got ''"),
        (("model.zero_shot=c.safetensors", "model.num_classes=3"), "model.num_classes must be null with model.zero"),
    ):
        ended = run(ranks(2, *settings, *words), tmp_path)
        assert ended.code == 2
        assert ended.err.count(said) == 1, ended.err
        assert not (tmp_path / "out").exists()
