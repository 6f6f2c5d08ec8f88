"""A private cache folder, and file writes that are whole or absent.

What lies in a cache is trusted later, so the folder is the user's alone (0700) and is refused when it is a symlink, belongs to
somebody else or can be written by others.
"""

from __future__ import annotations

import os
import pathlib
import stat
import tempfile


class NoHome(OSError):
    """There is no place for a cache."""


def home() -> pathlib.Path | None:
    """The user's folder; None in a container without HOME whose user /etc/passwd does not know."""
    try:
        return pathlib.Path.home()
    except (RuntimeError, KeyError):
        return None


def directory() -> pathlib.Path:
    """$XDG_CACHE_HOME/gpt_kernels, else ~/.cache/gpt_kernels; not created, not checked. Raises NoHome where there is none."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # a relative XDG_CACHE_HOME is invalid and to be ignored (XDG base directory specification)
    if os.path.isabs(root):
        return pathlib.Path(root) / "gpt_kernels"
    if (folder := home()) is None:
        raise NoHome("no home directory is known: set HOME or XDG_CACHE_HOME")
    return folder / ".cache" / "gpt_kernels"


def problem(path: pathlib.Path) -> str | None:
    """Why `path` must not be trusted, or None. A path that does not exist is fine."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:  # HOME=/dev/null, a home that we may not look into
        return f"{path}: {error.strerror}"
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a symbolic link"
    if status.st_uid != os.getuid():
        return f"{path} belongs to another user"
    if status.st_mode & 0o022:
        return f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):o}): chmod go-w it"
    return None


def _checked(path: pathlib.Path) -> pathlib.Path:
    if reason := problem(path):
        raise PermissionError(f"cache refused: {reason}")
    return path


def read(name: str, largest: int | None = None) -> bytes | None:
    """The cached file's bytes, None when there is none.

    Raises PermissionError when it, or the folder, is not private, ValueError when it is larger than `largest` bytes.
    """
    _checked(directory())
    path = _checked(directory() / name)
    if not path.exists():
        return None
    if largest is not None and path.stat().st_size > largest:
        raise ValueError(f"cache refused: {path} has more than {largest} bytes")
    return path.read_bytes()


def write(name: str, data: bytes) -> None:
    """Put `data` into the cache. Raises PermissionError when the folder is not private, OSError when it cannot be written."""
    folder = _checked(directory())
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomically(_checked(folder) / name, data)


def write_atomically(path: pathlib.Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file so that nobody, at any moment, sees half of it: a temporary file beside it, renamed at the end."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
