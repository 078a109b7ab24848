"""torchvision without `torch._dynamo`, which takes 1.5 of the 1.65 s that `import torchvision.models` does.

torchvision.ops.roi_align imports it for one function, which only detectors call. While torchvision is imported, a
stand-in takes the place of that function's module, and its function loads the real one when it is called.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

UTILS = "torch._dynamo.utils"


class StandIn(ModuleType):
    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        return bool(importlib.import_module(UTILS).is_compile_supported(device_type))

    def __getattr__(self, name: str) -> Any:
        # Another release of torchvision wants more of it, or another thread imports torch._dynamo meanwhile.
        if name.startswith("__"):
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(UTILS), name)

    def leave(self) -> None:
        if sys.modules.get(UTILS) is self:
            del sys.modules[UTILS]


def import_torchvision() -> Any:
    """Import torchvision; what imports it first in a process should do it by this."""
    if "torchvision" not in sys.modules and UTILS not in sys.modules:
        stand_in = StandIn(UTILS)
        sys.modules[UTILS] = stand_in
        try:
            import torchvision
        finally:
            stand_in.leave()
    import torchvision

    return torchvision
