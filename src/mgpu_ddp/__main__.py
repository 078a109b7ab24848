"""`python -m mgpu_ddp` is `mgpu-infer`."""

from mgpu_ddp.launch import main

if __name__ == "__main__":
    main()
