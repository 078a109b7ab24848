"""Inductor's cache of compiled code, without what a killed compiler has left in it.

A linker writes a library in place. When it is killed, a part stays under the final name, which Inductor takes for the
whole from then on: loading it fails, or ends the process by SIGBUS, until somebody empties the cache.
"""

import hashlib
import struct
from contextlib import suppress
from pathlib import Path

HEADER_BYTES = 64


def remove_truncated_libraries() -> None:
    """Delete the libraries that are not whole, so that they are compiled again. Those being written now are left."""
    from torch._inductor.codecache import get_lock_dir
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils._filelock import FileLock

    for library in Path(cache_dir()).glob("*/*.so"):
        if is_truncated(library):
            # Whoever compiles it holds this lock.
            lock = FileLock(Path(get_lock_dir()) / f"{library.name.partition('.')[0]}.lock", timeout=0)
            with suppress(OSError), lock:
                if is_truncated(library):
                    library.unlink()


def was_compiled(what: str) -> bool:
    """True if the cache has what `note_compiled` was told of."""
    return _note(what).exists()


def note_compiled(what: str) -> None:
    """Note that the cache has the code of a model, told from others by a text. A cache that takes no notes has none."""
    note = _note(what)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _note(what: str) -> Path:
    # In the cache's own folder, because they go together.
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "mgpu_ddp" / hashlib.sha256(what.encode()).hexdigest()


def is_truncated(library: Path) -> bool:
    """True if a file ends before its section headers do, which a linker writes last. Source: elf(5), Elf64_Ehdr."""
    try:
        with library.open("rb") as file:
            header, size = file.read(HEADER_BYTES), file.seek(0, 2)
    except FileNotFoundError:
        return False
    if len(header) < HEADER_BYTES or not header.startswith(b"\x7fELF"):
        return True
    (offset,), (entry_bytes, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(size < offset + entry_bytes * entries)
