"""Scripts as users write them, each of which calls `mgpu_ddp.main`."""
