"""The samples of a dataset that the user's script brings: items of any kind, by index."""

import hashlib
import json
import multiprocessing
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from mgpu_ddp.config.script import Script
from mgpu_ddp.data.listing import no_names
from mgpu_ddp.data.samples import Samples
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError, kind_of, place_in_code
from mgpu_ddp.preprocess.transform import AnyTransform, Pixels, StageClock, TensorInput, decode, to_rgb, upright

ITEMS = (
    "a PIL image, a uint8 array or Tensor (H, W, 3), encoded bytes, a float Tensor, or a dict with one of these as"
    " 'image' and maybe 'key', 'label' and further scalars"
)
NOT_CARRIED = ("image", "key", "label")
SCALARS = {bool: "bool", int: "int64", float: "float64", str: "object"}
"""The dtypes in which scalars of a dataset are carried into the rows."""
TRIED = 16
"""Items that are tried until one can be loaded, to see what a dataset holds."""
KEYS = 8
"""Items whose keys tell one dataset from another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemKind:
    """The kind of a dataset's items, by the first that can be loaded."""

    image: str
    """encoded, pixels, or tensor: model input as it is."""
    carried: dict[str, str]
    """Scalars that go into the rows, each with its dtype; `path` where there are keys."""
    shape: tuple[int, ...] = ()
    """Of a tensor."""
    example: Pixels | None = None
    """The tensor itself, float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptDataset:
    """The script's dataset, with what its items are."""

    dataset: Any
    kind: ItemKind
    in_shards: bool
    """The job is one of several shards, which are one result if all their items are the same."""

    def digest(self, stop: int) -> str:
        """Tell the first `stop` items, or all where they are in shards, from others by some of their keys."""
        stop = len(self.dataset) if self.in_shards else stop
        return hashlib.sha256(json.dumps(keys_of_some(self.dataset, stop)).encode()).hexdigest()


def open_script_dataset(found: ScriptDataset | None) -> "ScriptSamples":
    """The samples of a script's dataset.

    Raises:
        UsageError: this is not the script that brings it.
    """
    if found is None:
        raise UsageError("data must be one that can be opened here, got 'script'. Start the script that brings it.")
    return ScriptSamples(found.dataset, found.kind)


def bring_dataset(script: Script, world: World, *, in_shards: bool) -> ScriptDataset | None:
    """Build the script's dataset and look at its items. Collective: every rank calls this.

    Raises:
        UsageError: it cannot be used, or ranks have different ones.
    """
    if script.dataset is None:
        return None
    with world.together("build the dataset"):
        dataset = build_dataset(script.dataset)
        kind = look_at(dataset)
    mine = [len(dataset), kind.image, kind.carried, list(kind.shape)]
    for rank, other in enumerate(world.exchange("dataset", mine)):
        if other != mine:
            raise UsageError(
                f"dataset must be the same on all ranks, got {len(dataset):,} items ({kind.image}) on rank"
                f" {world.rank} and {other[0]:,} ({other[1]}) on rank {rank}. Build it from the same files everywhere."
            )
    return ScriptDataset(dataset=dataset, kind=kind, in_shards=in_shards)


def build_dataset(build: Any) -> Any:
    """Call the script's function.

    Raises:
        UsageError: it raises, or what it returns has no items by index.
    """
    try:
        dataset = build()
    except (Exception, SystemExit) as error:
        raise UsageError(f"dataset: the function raised {place_in_code(error)}. Fix it and start again.") from error
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"dataset must have items by index, got {kind}: without an index no row can be told to be there exactly"
            " once. Give it __len__ and __getitem__(i)."
        )
    try:
        len(dataset)
    except Exception as error:
        why = place_in_code(error)
        raise UsageError(f"dataset must have a length, got {kind} ({why}). Give it __len__.") from error
    return dataset


class ScriptSamples(Samples):
    """The items of the script's dataset. It is used in loader workers, which are forked: it need not be picklable."""

    def __init__(self, dataset: Any, kind: ItemKind) -> None:
        self._dataset, self._kind = dataset, kind
        self._taken: dict[int, dict[str, Any]] = {}
        """Values that came with the items of the batch that is being loaded."""
        self._last: tuple[int, Any] | None = None
        """The item that `read` has taken and `load` is about to want."""

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int, clock: StageClock) -> bytes | None:
        image = self._take(index, clock)
        return bytes(image) if isinstance(image, bytes | bytearray | memoryview) else None

    def load(
        self, index: int, transform: AnyTransform, clock: StageClock, data: bytes | None = None
    ) -> tuple[Pixels, int]:
        image = data if data is not None else self._take(index, clock)
        return _as_input(image, transform), self.known_label(index)

    def _take(self, index: int, clock: StageClock) -> Any:
        """The image of an item; what comes with it is kept."""
        if self._last is None or self._last[0] != index:
            item = self._dataset[index]
            image, values = _parts_of(item)
            self._taken[index] = _checked(values, self._kind.carried)
            self._last = index, image
        return self._last[1]

    def known_label(self, index: int) -> int:
        return int(self._taken.get(index, {}).get("label", -1))

    def take_carried(self, indices: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
        taken, self._taken, self._last = self._taken, {}, None
        found: dict[str, npt.NDArray[np.generic]] = {}
        for name, dtype in self._kind.carried.items():
            values = [taken.get(index, {}).get(name) for index in indices]
            empty: Any = "" if dtype == "object" else 0
            data = np.array([empty if value is None else value for value in values], dtype=dtype)
            found[name] = np.ma.MaskedArray(data, [value is None for value in values])
        return found

    def names(self, indices: npt.NDArray[np.int64]) -> Any:
        return no_names(len(indices))


def _parts_of(item: Any) -> tuple[Any, dict[str, Any]]:
    """An item's image, and what comes with it: `path`, `label` and scalars."""
    if not isinstance(item, dict):
        return item, {}
    if "image" not in item:
        raise TypeError(f"the item has no 'image', only {', '.join(map(repr, item))}")
    if "path" in item:
        raise TypeError("the item must give its path as 'key'")
    values = {str(name): _scalar(name, value) for name, value in item.items() if name not in NOT_CARRIED}
    if item.get("key") is not None:
        values["path"] = _text(str(item["key"]))
    if item.get("label") is not None:
        values["label"] = _label(item["label"])
    return item["image"], values


def _scalar(name: Any, value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and np.ndim(value) == 0:
        value = value.item()
    if value is not None and type(value) not in SCALARS:
        raise TypeError(f"{name!r} must be a number, a bool, text or None, not {type(value).__name__}")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise TypeError(f"{name!r} must be a number of 64 bits, not {value}")
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    r"""Text that every format can hold, as `readable` makes it of paths: surrogates become the text \udcXX."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _label(value: Any) -> int:
    label = int(value)
    if not isinstance(value, str) and label != value:
        raise TypeError(f"'label' must be a whole number, not {value}")
    if not -(2**31) <= label < 2**31:
        raise TypeError(f"'label' must be a number of 32 bits, not {label}")
    return label


def _checked(values: dict[str, Any], carried: dict[str, str]) -> dict[str, Any]:
    """Values as the first item's are."""
    for name, value in values.items():
        if name == "label" or value is None:
            continue
        if name not in carried:
            raise TypeError(f"{name!r} is not carried by the items before")
        dtype = SCALARS[type(value)]
        if dtype != carried[name] and (dtype, carried[name]) != ("int64", "float64"):
            raise TypeError(f"{name!r} must be {carried[name]} as in the items before, not {type(value).__name__}")
    return values


def _as_input(image: Any, transform: AnyTransform) -> Pixels:
    """An item's image as the transform's output.

    Raises:
        TypeError: it is no image.
    """
    if isinstance(image, torch.Tensor) and image.is_floating_point():
        if not isinstance(transform, TensorInput) or transform.function is not None:
            raise TypeError("the item is a float Tensor, and those before were images")
        return transform.checked(image, "the item")
    if isinstance(transform, TensorInput) and transform.function is None:
        raise TypeError(f"the item is {type(image).__name__}, and those before were float Tensors")
    if isinstance(image, bytes | bytearray | memoryview):
        return transform.geometry(decode(bytes(image), transform.decoded_side))
    if isinstance(image, Image.Image):
        return transform.geometry(to_rgb(upright(image)))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return transform.of_pixels(image)
    raise _no_image(image)


def _no_image(found: Any) -> TypeError:
    return TypeError(f"the item must be {ITEMS}, not {kind_of(found)}")


def look_at(dataset: Any) -> ItemKind:
    """Find out what the items are, in a process of its own: what the dataset opens must not be there when workers fork.

    Raises:
        UsageError: none of the first items can be loaded, or they are no images.
    """
    kind = in_fork(lambda: _look_at(dataset))
    if isinstance(kind, str):
        raise UsageError(kind)
    assert isinstance(kind, ItemKind)
    return kind


def _look_at(dataset: Any) -> ItemKind | str:
    if not len(dataset):
        return ItemKind(image="pixels", carried={})
    first_error, kind = "", None
    empty: set[str] = set()
    for index in range(min(TRIED, len(dataset))):
        try:
            image, values = _parts_of(dataset[index])
            carried = {
                name: SCALARS[type(value)] for name, value in values.items() if name != "label" and value is not None
            }
            kind = _kind_of(image, carried) if kind is None else replace(kind, carried={**carried, **kind.carried})
        except Exception as error:
            first_error = first_error or f"item {index}: {place_in_code(error)}"
            continue
        empty |= {name for name, value in values.items() if value is None}
        if empty <= kind.carried.keys():
            return kind
    if kind is not None:
        names = ", ".join(sorted(empty - kind.carried.keys()))
        return f"dataset must have a value for {names} in one of its first {TRIED} items, got None. Leave it out."
    return f"dataset must have an item among its first {TRIED} that can be loaded, got {first_error}"


def _kind_of(image: Any, carried: dict[str, str]) -> ItemKind:
    if isinstance(image, torch.Tensor) and image.is_floating_point():
        example: Any = image.detach().to(torch.float32).numpy()
        return ItemKind(image="tensor", carried=carried, shape=tuple(image.shape), example=example)
    if isinstance(image, bytes | bytearray | memoryview):
        return ItemKind(image="encoded", carried=carried)
    is_pixels = isinstance(image, np.ndarray | torch.Tensor) and tuple(image.shape[2:]) == (3,)
    if not (isinstance(image, Image.Image) or is_pixels):
        raise _no_image(image)
    return ItemKind(image="pixels", carried=carried)


def keys_of_some(dataset: Any, stop: int) -> list[str | None]:
    """The keys of the first, the last and a few items before `stop`; None for one without or that cannot be loaded."""
    indices = sorted({int(index) for index in np.linspace(0, stop - 1, KEYS)}) if stop else []

    def read() -> list[str | None]:
        keys: list[str | None] = []
        for index in indices:
            try:
                keys.append(_parts_of(dataset[index])[1].get("path"))
            except Exception:
                keys.append(None)
        return keys

    keys: list[str | None] = in_fork(read)
    return keys


def in_fork(act: Any) -> Any:
    """Call a function in a process that is forked for it, and return what it does.

    Raises:
        UsageError: it raises, or its process dies.
    """
    context = multiprocessing.get_context("fork")
    results, into = context.Pipe(duplex=False)

    def run(into: Connection) -> None:
        try:
            into.send_bytes(pickle.dumps((True, act())))
        except BaseException as error:
            into.send_bytes(pickle.dumps((False, place_in_code(error))))

    process = context.Process(target=run, args=(into,), daemon=True)
    process.start()
    into.close()
    try:
        done, result = pickle.loads(results.recv_bytes())
    except EOFError:
        process.join()
        raise UsageError(
            f"dataset must have items that can be read, got exit code {process.exitcode} from the process that read the"
            " first. Fix it and start again."
        ) from None
    process.join()
    if not done:
        raise UsageError(f"dataset must have items that can be read, got {result}")
    return result
