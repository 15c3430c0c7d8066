"""A checkpoint that is written while training goes on.

The step that asks for it copies the tensors to host memory, which is all that it waits for; a thread of each rank
writes, syncs and reads back. Nothing there talks to other ranks: the trainer learns with its per-step reduction when
all threads are done, and `publish` then does the short rest on the main threads.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm_scale.engine.folder_write import FolderWrite
from ldm_scale.engine.rank_files import Piece


class BackgroundSave:
    """A folder that a thread of this rank is writing. Collective: all ranks construct it.

    Raises: CheckpointError on all ranks if the folder cannot be made.
    """

    def __init__(self, root: Path, images: int, rank: int, pieces: Iterable[Piece], content: dict[str, Any]) -> None:
        self.images = images
        self._folder = FolderWrite(root, images, rank)
        self._content = content
        self._failure: BaseException | None = None
        self._folder.begin()
        # A copy even of what lies in host memory already: training is about to change it.
        copies = [dataclasses.replace(p, values=p.values.detach().to("cpu", copy=True)) for p in pieces]
        # A daemon: a run that ends by an error does not wait for a folder that nobody will publish.
        self._thread = threading.Thread(target=self._write, args=(copies,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread has something left to do."""
        return self._thread.is_alive()

    def publish(self) -> Path:
        """The folder, complete; waits for this rank's thread.

        Raises: CheckpointError on all ranks if any rank could not write; nothing half-written stays.
        Collective: all ranks.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._folder.publish(self._content)

    def _write(self, copies: list[Piece]) -> None:
        try:
            self._folder.write(copies)
        except BaseException as failure:  # a defect of ours: told where the run can be ended
            self._failure = failure
        finally:
            copies.clear()  # the memory is needed no longer, though this object may live on
