"""Files that are written whole or not at all."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there becomes `path` when the block ends well.

    A kill, a full disk or an exception leaves the old file, or none, and never a half of the new one.
    The temporary file keeps the suffix, because writers choose their format by it; its name is no other's, on hosts that share a disk too.

    Raises:
        OSError: the folder cannot be made or written; the message names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")  # without its stem, for a name may be as long as the disk takes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder could not be made there is nothing to delete
            temporary.unlink()


def write_json(path: str | Path, content: Any) -> None:
    """Write plain data as JSON, whole or not at all; raises OSError."""
    with written_whole(path) as temporary:
        # bytes of a file's name that are not Unicode become JSON's own \udcXX escapes
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")
