"""The words for what produced predictions."""

from typing import Any

import pytest

from mgpu_ddp.preprocess.transform import AnyTransform, TensorInput, imagenet, plain
from mgpu_ddp.reporting.provenance import provenance
from tests.support.run_folders import wanted
from tests.support.runs import ROOT


def words(**fingerprint: Any) -> dict[str, str]:
    return provenance(wanted(fingerprint={key.replace("__", "."): value for key, value in fingerprint.items()}))


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (plain(32), "resized to 32 × 32 pixels (bilinear), values from 0 to 1"),
        (
            imagenet(224),
            (
                "shorter side resized to 256 pixels (bilinear), 224 × 224 cut from the centre, values from 0 to 1 less"
                " mean 0.485, 0.456, 0.406, divided by std 0.229, 0.224, 0.225"
            ),
        ),
        (TensorInput(shape=(1, 8, 9)), "the dataset yields model input of 1 × 8 × 9"),
        (
            TensorInput(shape=(3, 8, 8), function=lambda image: image, name="mine.to_tensor"),  # type: ignore[arg-type, return-value]
            "mine.to_tensor of the script makes model input of 3 × 8 × 8",
        ),
    ],
)
def test_the_preprocessing_is_told(transform: AnyTransform, expected: str) -> None:
    described = {f"transform.{key}": value for key, value in transform.described().items()}
    assert words(**described)["preprocessing"] == expected


def test_the_docs_show_it_as_it_is() -> None:
    described = {f"transform.{key}": value for key, value in imagenet(224).described().items()}
    assert f"> {words(**described)['preprocessing']}\n" in (ROOT / "docs" / "report.md").read_text()


def test_a_job_is_told() -> None:
    found = words(
        model__name="resnet50",
        model__num_classes=1000,
        model__weights="0123456789abcdef",
        data__name="folder",
        data__root="my photos",
        runtime__device="NVIDIA H200",
        runtime__precision="fp16",
        runtime__compile="on",
        runtime__decode="gpu",
    )
    assert found == {
        "model": "resnet50, 1,000 classes",
        "weights": "sha256 0123456789ab…",
        "samples": "20 of my photos",
        "device": "NVIDIA H200 in fp16, compiled, JPEGs decoded on the GPU",
    }


def test_what_an_older_manifest_does_not_say_is_left_out() -> None:
    assert words(data__name="fake") == {"model": "resnet18", "samples": "20 of FakeData"}
