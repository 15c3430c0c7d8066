"""A checkpoint that is written while training goes on.

The step that asks for it copies the tensors to host memory, nearly all that it waits for. A thread of each rank
then writes, syncs and reads back; when the trainer's per-step reduction says that all are done, the ranks exchange
sizes and checksums, and rank 0's thread publishes the folder and removes older ones. The threads talk to no other rank.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.engine.folder_write import FolderWrite
from ldm_scale.engine.rank_files import Piece


class HostMemory:
    """Where a rank's values are copied to, the same at every save of a run.

    Making it costs more than the copy: fresh pages on a CPU, pinned ones on CUDA.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def copies(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with copies of their values, which hold until the next call."""
        copied, is_on_device = [], False
        with _one_more_thread():
            for number, piece in enumerate(pieces):
                values = piece.values.detach()
                is_on_device |= values.is_cuda
                copied.append(
                    dataclasses.replace(piece, values=self._room(number, values).copy_(values, non_blocking=True))
                )
        if is_on_device:
            torch.cuda.current_stream().synchronize()
        return copied

    def _room(self, number: int, values: Tensor) -> Tensor:
        if number == len(self._kept):
            self._kept.append(torch.empty(0))
        if self._kept[number].shape != values.shape or self._kept[number].dtype != values.dtype:
            self._kept[number] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        return self._kept[number]


@contextmanager
def _one_more_thread() -> Iterator[None]:
    """The core that `env.cpu_threads` leaves to others copies too: they get all cores again when training goes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class BackgroundSave:
    """A folder that threads are writing; only one at a time from a `memory`. Collective: all ranks construct it.

    Raises: CheckpointError on all ranks if the folder cannot be made.
    """

    def __init__(
        self,
        root: Path,
        images: int,
        rank: int,
        pieces: Iterable[Piece],
        content: dict[str, Any],
        after: Callable[[], None],
        memory: HostMemory,
    ) -> None:
        self.images = images
        self._folder = FolderWrite(root, images, rank)
        self._content, self._after = content, after
        self._is_exchanged = False
        self._failure: BaseException | None = None
        self._folder.begin()
        # A copy even of what lies in host memory already: training is about to change it.
        copies = memory.copies(pieces)
        self._thread = self._started(lambda: self._folder.write(copies))

    @property
    def is_working(self) -> bool:
        """Whether this rank's thread has something left to do."""
        return self._thread.is_alive()

    def advance(self) -> Path | None:
        """The folder if it is complete now, None if one more call is needed; waits for this rank's thread.

        Raises: CheckpointError on all ranks if any rank could not write; nothing half-written stays.
        Collective: all ranks.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        if self._is_exchanged:
            return self._folder.confirm()
        self._folder.exchange(self._content)
        self._is_exchanged = True
        self._thread = self._started(lambda: self._folder.publish(self._after))
        return None

    def _started(self, action: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                action()
            except BaseException as failure:  # a defect of ours: told where the run can be ended
                self._failure = failure

        # A daemon: a run that ends by an error does not wait for a folder that nobody will publish.
        thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        thread.start()
        return thread
