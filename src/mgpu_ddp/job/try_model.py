"""Tries a model of which nothing is known: the columns of its outputs, and what may make its forward faster.

On rank 0 alone, with noise or a sample of the dataset, before the run folder is claimed; all ranks hear the result.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from mgpu_ddp.config.resolved import Resolved, Speedups
from mgpu_ddp.errors import OutOfMemoryError, UsageError, place_in_code
from mgpu_ddp.inference.outputs import OutputsError
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.job.autotune import noise, predict_batches
from mgpu_ddp.job.context import Setup
from mgpu_ddp.loader.batch import Batch
from mgpu_ddp.models.build import name_classes
from mgpu_ddp.models.fusion import fold_batch_norms
from mgpu_ddp.models.prepare import copy_of, has_hooks, place
from mgpu_ddp.output.columns import ColumnType, Ragged, as_json
from mgpu_ddp.output.rows import Rows
from mgpu_ddp.preprocess.transform import Transform

log = logging.getLogger("mgpu_ddp")

BATCH = 2
"""Images that the columns are found with."""
FULL, HALF = 1e-3, 5e-2
"""Folding, and half precision, may move outputs by so much of their largest value."""
IN_FULL = ("fp32", "tf32")
NOTHING = Speedups(fold=False, graphs=False)
STREAMS = 3
"""Batches side by side of a model whose control flow depends on data, so that it waits for the GPU."""
SHARE_OF_MEMORY = 0.6
"""Batches side by side may take so much of the GPU's memory."""


def try_model(setup: Setup) -> Setup:
    """Find the columns, the precision and the speedups. Collective: every rank calls this.

    Raises:
        UsageError: forward raises, or returns what is no columns.
    """
    world, mine = setup.world, dict[str, Any]()
    with world.together("try the model"):
        if world.rank == 0:
            mine = Trials(setup).run()
    found = world.share("what the model is", mine)
    types = tuple(ColumnType.read(values) for values in found["types"])
    model = name_classes(replace(setup.model, num_classes=found["num_classes"]), setup.job.config, world)
    config = setup.job.config
    is_scalar = all(not each.shape and not each.ragged for each in types)
    collect = setup.resolved.collect
    if model.num_classes is None and config.output.collect == "auto":
        collect = "gather" if is_scalar and config.output.format != "npy" else "shards"
    resolved = replace(
        setup.resolved, precision=found["precision"], speedups=Speedups(**found["speedups"]), collect=collect
    )
    log.info("%s: %s, %s; returns %s", model.origin, resolved.precision, resolved.speedups, ", ".join(map(str, types)))
    predictors = replace(setup.predictors, model=model)
    return replace(setup, model=model, predictors=predictors, types=types, resolved=resolved)


class Trials:
    """Runs copies of the module in one way after the other. Rank 0 only."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._config, self._device = setup, setup.job.config, setup.world.device
        self._batch = noise(setup.resolved.transform, BATCH, self._device)
        self._num_classes: int | None = None
        self._keeps_state = False

    def run(self) -> dict[str, Any]:
        """Everything that is found, as JSON values."""
        # 1) As it is, which tells the columns, and whether it keeps anything of a batch.
        reference = self._reference()
        types = [ColumnType.of(name, column) for name, column in reference.columns.items()]
        self._check_columns(types)
        # 2) The fastest way in which it still says the same.
        precision, speedups, rows = self._fastest(reference, is_ragged=any(each.ragged for each in types))
        # One that is not copied has been moved.
        self._setup.model.module.cpu()
        return {
            "types": as_json([ColumnType.of(name, column) for name, column in rows.columns.items()]),
            "num_classes": self._num_classes,
            "precision": precision,
            "speedups": asdict(speedups),
        }

    def _reference(self) -> Rows:
        plain = replace(self._setup.resolved, speedups=NOTHING, precision="fp32")
        module = self._placed(plain)
        other = replace(self._batch, pixels=self._batch.pixels.flip(0, -1))
        try:
            rows = self._rows_of(module, plain, outputs_only=True)
            state = state_of(module)
            self._rows_of(module, plain, outputs_only=True, batch=other)
            self._keeps_state = has_hooks(module) or state_of(module) != state
            return rows
        except (OutOfMemoryError, UsageError):
            raise
        except OutputsError as error:
            # Without the batch and the rank.
            raise UsageError(f"model: {error.__cause__}. Correct what forward, or outputs=, returns.") from None
        except Exception as error:
            transform = self._setup.resolved.transform
            size = (3, *transform.out_size) if isinstance(transform, Transform) else transform.shape
            why = f"{place_in_code(error)} for a batch of {(BATCH, *size)}"
            raise UsageError(f"model: forward, or outputs=, raised {why}. Fix it and start again.") from error

    def _fastest(self, reference: Rows, *, is_ragged: bool) -> tuple[str, Speedups, Rows]:
        """The first way in which the outputs stay what they are: precision, speedups and the rows."""
        wanted, why = self._setup.resolved.precision, ""
        for precision, speedups in self._ways(is_ragged=is_ragged):
            try:
                rows = self._rows(replace(self._setup.resolved, precision=precision, speedups=speedups))
            except (OutOfMemoryError, UsageError):
                raise
            except Exception as error:
                why = why or place_in_code(error)
                continue
            is_plain = precision in IN_FULL and not speedups.fold
            if is_plain or self._says_the_same(rows, reference, FULL if precision in IN_FULL else HALF):
                if precision != wanted:
                    log.warning("the model runs in %s, because in %s it does not: %s", precision, wanted, why)
                return precision, speedups, rows
            why = why or "its outputs would be others"
        raise UsageError(f"runtime.precision must be fp32 for this model, got {wanted!r} ({why}). Leave it out.")

    def _ways(self, *, is_ragged: bool) -> Iterator[tuple[str, Speedups]]:
        precision = self._setup.resolved.precision
        module, on_gpu = copy_of(self._setup.model.module.eval()), self._device.type == "cuda"
        is_copied = module is not self._setup.model.module
        plain = replace(NOTHING, serial=self._keeps_state)
        # What is traced keeps nothing.
        may_trace = self._config.runtime.fold and is_copied and not self._keeps_state
        if may_trace and isinstance(fold_batch_norms(module), fx.GraphModule):
            yield precision, Speedups(fold=True, fuse=on_gpu, graphs=on_gpu)
        # Coordinates need more digits than half precision has: autocast keeps what is computed from them in fp32.
        if precision in IN_FULL or (is_copied and not is_ragged):
            yield precision, plain
        if precision not in IN_FULL:
            yield precision, replace(plain, autocast=True)
            if self._config.runtime.precision == "auto":
                yield "fp32", plain

    def _says_the_same(self, rows: Rows, reference: Rows, tolerance: float) -> bool:
        """Compare outputs; whole numbers (of classes that are nearly as likely) and numbers of boxes may differ."""
        if len(rows.errors) > len(reference.errors):
            return False
        for name, value in reference.columns.items():
            found = rows.columns.get(name)
            if found is None or isinstance(found, Ragged) or isinstance(value, Ragged) or value.dtype.kind != "f":
                continue
            largest = np.abs(value[np.isfinite(value)]).max(initial=1e-6)
            if found.shape != value.shape or not np.allclose(
                found, value, rtol=0, atol=tolerance * largest, equal_nan=True
            ):
                return False
        return True

    def _placed(self, resolved: Resolved) -> nn.Module:
        module = copy_of(self._setup.model.module.eval().requires_grad_(False))
        return place(module, self._config, resolved, self._device, None)

    def _rows(self, resolved: Resolved) -> Rows:
        """Predict the batch with a copy of the module."""
        return self._rows_of(self._placed(resolved), resolved)

    def _rows_of(
        self, module: nn.Module, resolved: Resolved, *, outputs_only: bool = False, batch: Batch | None = None
    ) -> Rows:
        """Predict a batch; `outputs_only` leaves out what the head must be known for."""
        config = self._config
        if outputs_only:
            config = replace(config, output=replace(config.output, fields=["logits"]))
        outputs = self._setup.model.outputs
        predictor = Predictor(module, config, resolved, self._device, num_classes=self._num_classes, outputs=outputs)
        (rows,) = predict_batches([batch or self._batch], predictor, self._setup.world)
        return rows

    def _check_columns(self, types: Sequence[ColumnType]) -> None:
        names = [each.name for each in types]
        output = self._config.output
        if names[:2] == ["pred", "prob"]:
            self._num_classes = types[-1].shape[0]
            return
        asked = [name for name in output.fields if name not in ("topk", "size")]
        if asked and sorted(asked) != sorted(names):
            raise UsageError(
                "output.fields must be [size], or left out, where the model returns columns of its own, got"
                f" {output.fields!r}. Leave it out."
            )
        if output.format == "npy" and (len(types) > 1 or types[0].ragged or not types[0].dtype.startswith("float")):
            raise UsageError(
                "output.format=npy must have one Tensor of floats of fixed shape, got"
                f" {', '.join(map(str, types))}. Choose parquet, or return one of them."
            )


def state_of(module: nn.Module) -> list[Any]:
    """Everything that a module keeps besides its parameters, by value."""
    kept = [_by_value(buffer) for buffer in module.buffers()]
    for part in module.modules():
        own = {name: value for name, value in vars(part).items() if name not in vars(nn.Module())}
        kept.append(_by_value(own))
    return kept


def _by_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()
    if isinstance(value, dict):
        return [(str(key), _by_value(each)) for key, each in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [_by_value(each) for each in value]
    return value if isinstance(value, int | float | str | bytes | None) else type(value).__name__


def check_neighbours(setup: Setup) -> Setup:
    """Find out whether a row keeps its bits whatever stands beside it in a batch. Collective: every rank calls this.

    Where it does not only with fused activations, these are left out.
    """
    if setup.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setup.world.device)
    bitwise = _keeps_bits(setup)
    if not bitwise and setup.resolved.speedups.fuse and setup.job.config.runtime.deterministic:
        ways = replace(setup.resolved.speedups, fuse=False)
        setup = replace(setup, resolved=replace(setup.resolved, speedups=ways))
        bitwise = _keeps_bits(setup)
    if not setup.resolved.speedups.graphs:
        ways = replace(setup.resolved.speedups, streams=_streams(setup))
        setup = replace(setup, resolved=replace(setup.resolved, speedups=ways))
    if not bitwise:
        log.warning("rows of this model depend on their batch: another number of ranks may change their last bits")
    return replace(setup, bitwise=bitwise)


def _keeps_bits(setup: Setup) -> bool:
    """Compare rows that have other neighbours, zeros among them. Collective."""
    predictor, world, size = setup.predictors.get(setup.resolved), setup.world, setup.resolved.batch_size
    kept = True
    with world.together("try the model with other neighbours"):
        if world.rank == 0:
            batch = noise(setup.resolved.transform, size, world.device)
            other = replace(batch, pixels=batch.pixels.clone())
            half = -(-size // 2)
            other.pixels[half:] = 0
            first, second = predict_batches([batch, other], predictor, world)
            mine, others = (rows.take(np.arange(half)) for rows in (first, second))
            kept = all(_same_bits(mine.columns[name], others.columns[name]) for name in mine.columns)
    return bool(world.share("rows keep their bits", kept))


def _streams(setup: Setup) -> int:
    """How many batches may run side by side, by the memory that one of them has taken. Collective."""
    world, number = setup.world, 1
    ways = setup.resolved.speedups
    waits = (
        not ways.serial
        and world.device.type == "cuda"
        and setup.job.config.strategy == "ddp"
        and setup.resolved.compile != "on"
    )
    if waits and world.rank == 0:
        total = torch.cuda.get_device_properties(world.device).total_memory
        room = int(SHARE_OF_MEMORY * total // max(1, torch.cuda.max_memory_allocated(world.device)))
        number = max(1, min(STREAMS, room))
    return int(world.share("streams", number))


def _same_bits(mine: Any, other: Any) -> bool:
    if isinstance(mine, Ragged):
        return bool(np.array_equal(mine.lengths, other.lengths)) and _same_bits(mine.values, other.values)
    return bool(mine.shape == other.shape and mine.tobytes() == other.tobytes())
