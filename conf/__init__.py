"""The YAML files of mgpu_ddp, importable so that Hydra finds them from any working directory."""
