"""PyTorch Lightning: Trainer.predict with a BasePredictionWriter that writes each rank's predictions at the end.

Source: lightning.ai/docs, "Trainer.predict" and `BasePredictionWriter`, whose first example this is.
"""

import peer
import torch
from torch.utils.data import DistributedSampler

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BasePredictionWriter
except ImportError:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import BasePredictionWriter


class Classifier(pl.LightningModule):
    """The model."""

    def __init__(self):
        super().__init__()
        self.model = peer.model()

    def predict_step(self, batch, batch_idx):
        images, _ = batch
        return self.model(images.to(memory_format=torch.channels_last)).argmax(dim=1)


class Writer(BasePredictionWriter):
    """One file of predictions per rank."""

    def __init__(self):
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        torch.save(torch.cat(predictions).cpu(), f"predictions-{trainer.global_rank}.pt")


class Metering(pl.Callback):
    """Tell the meter of each batch, and have it report while the ranks can still talk."""

    def __init__(self, meter):
        self._meter = meter

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._meter.add(len(outputs))

    def on_predict_end(self, trainer, pl_module):
        self._meter.report("Lightning")


def main() -> None:
    args = peer.parse()
    meter = peer.Meter(args)
    dataset = peer.folder(args)
    sampler = DistributedSampler(dataset, num_replicas=peer.WORLD_SIZE, rank=peer.RANK, shuffle=False)
    loader = peer.loader(dataset, peer.UntilOver(sampler, meter), batch_size=args.batch_size, workers=args.workers)
    trainer = pl.Trainer(
        accelerator="gpu" if peer.CUDA else "cpu",
        devices=args.gpus,
        strategy="ddp" if args.gpus > 1 else "auto",
        precision="16-mixed" if peer.CUDA else "32-true",
        benchmark=True,
        # The loader has its sampler already, one that knows when the time is up.
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Writer(), Metering(meter)],
    )
    trainer.predict(Classifier(), loader, return_predictions=False)


if __name__ == "__main__":
    main()
