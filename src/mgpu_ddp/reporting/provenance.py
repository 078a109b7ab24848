"""Tells in words how the predictions of a run folder came about."""

from collections.abc import Sequence
from typing import Any

from mgpu_ddp.output.manifest import Manifest

DECODERS = {
    "gpu": "JPEGs decoded on the GPU",
    "exact": "JPEGs decoded on the GPU as Pillow does",
    "cpu": "decoded by Pillow",
    "scaled": "JPEGs decoded at a fraction of their size",
}
NAMELESS = {"fake": "FakeData", "script": "the script's dataset"}
PRECISIONS = {"fp32": "fp32", "tf32": "fp32 with tf32 products", "bf16": "bf16", "fp16": "fp16"}


def provenance(manifest: Manifest) -> dict[str, str]:
    """The origin of the predictions, in words: model, weights, preprocessing, data, device and versions."""
    job = manifest.fingerprint
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    found = {
        "model": _model(job),
        "weights": _weights(manifest),
        "preprocessing": _preprocessing(job),
        "samples": f"{manifest.stop - manifest.start:,} of {source(manifest)}",
        "device": _device(job),
        "versions": versions,
    }
    return {name: words for name, words in found.items() if words}


def source(manifest: Manifest) -> str:
    """The dataset as the user named it."""
    job = manifest.fingerprint
    name = str(job.get("data.name"))
    return str(job.get("data.root") or job.get("data.path") or job.get("data.urls") or NAMELESS.get(name, name))


def _model(job: dict[str, Any]) -> str:
    classes = job.get("model.num_classes")
    return f"{job.get('model.name')}{f', {classes:,} classes' if isinstance(classes, int) and classes else ''}"


def _weights(manifest: Manifest) -> str:
    digest = manifest.fingerprint.get("model.weights")
    named = [manifest.weights, f"sha256 {digest[:12]}…" if isinstance(digest, str) else None]
    return ", ".join(filter(None, named))


def _preprocessing(job: dict[str, Any]) -> str:
    found = {key.removeprefix("transform."): value for key, value in job.items() if key.startswith("transform.")}
    if found.get("name") == "script":
        made = f"{found['function']} of the script makes" if found.get("function") else "the dataset yields"
        return f"{made} model input of {_by(found.get('shape', []))}"
    if not found.get("resize"):
        return ""
    resize = found["resize"]
    steps = [f"resized to {_by(resize)} pixels" if len(resize) > 1 else f"shorter side resized to {resize[0]} pixels"]
    steps[0] += f" ({found.get('interpolation')})"
    if found.get("crop"):
        crop = found["crop"] if isinstance(found["crop"], list) else [found["crop"]] * 2
        steps.append(f"{_by(crop)} cut from the centre")
    if found.get("mean") and found.get("std"):
        steps.append(f"values from 0 to 1 less mean {_listed(found['mean'])}, divided by std {_listed(found['std'])}")
    else:
        steps.append("values from 0 to 1")
    return ", ".join(steps)


def _device(job: dict[str, Any]) -> str:
    device, precision = job.get("runtime.device"), str(job.get("runtime.precision"))
    if device is None:
        return ""
    words = [f"{'CPU' if device == 'cpu' else device} in {PRECISIONS.get(precision, precision)}"]
    if job.get("runtime.compile") == "on":
        words.append("compiled")
    decode = job.get("runtime.decode")
    if decode and job.get("data.name") not in ("fake", "array"):
        words.append(DECODERS.get(decode, f"decode {decode}"))
    return ", ".join(words)


def _by(sizes: Sequence[Any]) -> str:
    """`(256, 128)` as 256 x 128."""
    return " × ".join(map(str, sizes))


def _listed(numbers: Sequence[Any]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
