"""Bytes of all tensors that live while something runs, and the most that lived at once: counted, not sampled.

Every operation passes here, on real tensors and on those of the meta device alike. What operations take
inside themselves (workspaces of convolutions, reordered weights) is not seen, nor what an allocator holds beyond it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of a kind of device that were made inside it, until they are gone. Units: bytes."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type
        self.now: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}  # by the address of the storage, which is one while it lives

    def reset_peak(self) -> None:
        """Nothing; `peak` counts from here on."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, result)
        return result

    def _note(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        address = storage._cdata
        if address in self._sizes or x.device.type != self._device_type:
            return
        self._sizes[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._sizes.pop(address)
