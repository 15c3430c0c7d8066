"""Folders that appear complete or not at all, whatever ends the program that writes them, and that destroy nothing.

What is being written lies under a temporary name beside its place. Failures, Ctrl-C and requests to end (`ending_well`)
take it away; only a kill or a power cut leaves it, under a name that begins with a dot and ends in .tmp.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ldm_scale.engine.tensor_file import sync_folder
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.processes import ending_well


def require_replaceable(target: Path, may_replace: Callable[[Path], object]) -> None:
    """Nothing, if a folder may be written at `target`: nothing is there, or what `may_replace` recognises.

    Raises: CheckpointError.
    """
    if target.is_dir():
        place = target.resolve()
        for what, found in (("the current folder", Path.cwd() == place), ("a mount point", place.is_mount())):
            if found:
                raise CheckpointError(f"{target} is {what}, which cannot be replaced: give a new folder in it")
        if any(target.iterdir()) and not may_replace(target):
            raise CheckpointError(
                f"{target} holds files that this command did not write and will not replace: give another folder, or "
                "empty that one"
            )
    elif target.exists():
        raise CheckpointError(f"{target} is a file, expected a folder to write: give another path")


def require_apart(target: Path, source: Path) -> None:
    """Nothing, if writing a folder at `target` does not take away what is read from `source`.

    Raises: ConfigError.
    """
    place, read = target.resolve(), source.resolve()
    if place == read or place in read.parents:
        raise ConfigError(
            f"--out {target} {'is' if place == read else 'holds'} {source}, which is read and would be replaced: give "
            "another folder"
        )


@contextmanager
def published_folder(target: Path, may_replace: Callable[[Path], object]) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place when the block ends, and vanishes if the block fails.

    A target that `may_replace` recognises is replaced, if nobody has changed it since. Between two renames it is absent
    for an instant (there is no portable way to exchange two folders), but it is never seen half-written, and a crash in
    between leaves the old one under a sibling name.
    Raises: CheckpointError if there is something else, before the block runs; or if files have come or changed there
    since, which stay.
    """
    require_replaceable(target, may_replace)
    place = target.resolve()  # not the link that leads there
    before = _entries(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(place.parent, place.name) as temporary, naming_place(target):
        # mkdtemp makes it private; what is published follows the user's umask like any other folder.
        content = temporary / "new"
        content.mkdir()
        yield content
        sync_folder(content)
        old = temporary / "old"
        try:
            if place.exists():
                place.rename(old)
                # Looked at where nobody finds it by its name any more.
                changed = sorted(path for path, state in _entries(old).items() if before.get(path) != state)
                if changed:
                    raise CheckpointError(
                        f"{target} has changed since this command began to write ({', '.join(changed[:4])}), so it is "
                        "left as it is and nothing was written: give another folder"
                    )
            content.rename(place)
        finally:
            if old.exists() and not place.exists():
                old.rename(place)
        sync_folder(place.parent)


@contextmanager
def temporary_folder(parent: Path, name: str = "") -> Iterator[Path]:
    """A folder in `parent` that nobody else sees, and that is gone when the block ends, however it ends.

    Raises: OSError that names the parent.
    """
    with ending_well(), naming_place(parent):
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}." if name else ".", suffix=".tmp", dir=parent))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming_place(target: Path) -> Iterator[None]:
    """Errors of writing there say where."""
    try:
        yield
    except SafetensorError as error:  # of other libraries' writers
        raise CheckpointError(f"{target} not written ({error}); free space there, or fix its permissions") from error
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk's error does not say where
            error.filename = str(target)
        raise


def _entries(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder, by its path there: size and time of the last change; {} where there is none."""
    found = {}
    for path in folder.rglob("*") if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # taken away meanwhile
            state = path.lstat()
            is_folder = stat.S_ISDIR(state.st_mode)
            found[str(path.relative_to(folder))] = (0, 0) if is_folder else (state.st_size, state.st_mtime_ns)
    return found
