"""Blocks of images measured on any number of ranks, with what is finished kept for the next start.

A part is what one block's measurement has given. The ranks take turns with the blocks; rank 0 gets all parts in the
order of the blocks, so that it can make the figures as if it had measured all. With a folder, each part is a file
there as soon as it is measured: after an interruption, on whatever number of ranks, what can be read is taken from
there, and the rest is measured. Files are found by the hash of all that they depend on. One that is damaged counts as
absent; where one cannot be written, the figures do not suffer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ldm_scale.engine import collectives
from ldm_scale.engine.agreement import agreed
from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.blocks import Block, MeasuredImages, Part
from ldm_scale.interchange.safetensors_io import json_sha256, tensors_sha256
from ldm_scale.telemetry.log import get_logger

FOLDER = "parts"
_EXTENSION = ".safetensors"


class PartFolder:
    """Parts of one measurement in files, `OUT/parts/HASH/BLOCK.safetensors`. `out` None: nothing is kept."""

    def __init__(self, out: Path | None, wanted: Mapping[str, Any]) -> None:
        self._root = None if out is None else out / FOLDER
        self.key = json_sha256(wanted)  # of all that the measurement depends on
        self._folder = None if self._root is None else self._root / self.key[:32]
        self._can_write = self._folder is not None

    def blocks(self) -> list[int]:
        """Numbers of the blocks that there is a file of."""
        if self._folder is None or not self._folder.is_dir():
            return []
        return sorted(int(path.stem) for path in self._folder.glob(f"*{_EXTENSION}") if path.stem.isdecimal())

    def get(self, block: int) -> Part | None:
        """The part of a block, or None, with a warning, if its file is damaged."""
        if self._folder is None:
            return None
        path = self._path(block)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                values = json.loads(metadata["values"])
                part = Part({name: file.get_tensor(name) for name in file.keys()}, values)  # noqa: SIM118
            if metadata["sha256"] != _sha256(block, part):
                raise ValueError("its hash is another")
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            get_logger().warning(f"{path} is damaged ({error}); its images are measured again")
            return None
        return part

    def put(self, block: int, part: Part) -> None:
        """Nothing; the part is kept, or a warning says once why not."""
        if self._folder is None or not self._can_write:
            return
        tensors = {name: tensor.contiguous() for name, tensor in part.tensors.items()}
        content = save(tensors, metadata={"values": json.dumps(part.values), "sha256": _sha256(block, part)})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(block), content)
        except OSError as error:
            self._can_write = False
            get_logger().warning(
                f"{self._folder} cannot be written ({error.strerror}): what is measured from now on has to be measured "
                "again after an interruption"
            )

    def remove(self) -> None:
        """Nothing; no part of this measurement is left: a result stands there now. What else lies there stays."""
        if self._folder is not None and self._root is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):  # others' are there too
                self._root.rmdir()

    def _path(self, block: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{block:06d}{_EXTENSION}"


def _sha256(block: int, part: Part) -> str:
    return json_sha256({"block": block, "values": part.values, "tensors": tensors_sha256(part.tensors)})


def measure_blocks(
    stream: MeasuredImages[Any],
    measure: Callable[[Block[Any]], Part],
    kept: PartFolder | None = None,
    *,
    others_have: Callable[[int], None] | None = None,
    between: Callable[[], object] | None = None,
) -> list[Part]:
    """The parts of all blocks in their order, on rank 0, where the stream has counted its images; nothing on others.

    `measure` is called with blocks that have at least one image. `others_have` is told numbers of images that this
    rank did not measure: those of other ranks, and those whose parts were kept. `between` is called before every block,
    on all ranks equally often; an error of it ends the measurement, as any other does.
    Raises: an error of any rank, on all ranks; DataError if an image cannot be used where a number was asked for.
    Collective: all ranks.
    """
    kept = kept or PartFolder(None, {})
    found: dict[int, Part] = {}

    def known(number: int) -> Part | None:
        part = kept.get(number)
        if part is not None:
            stream.check(part)
        return part

    for block, part in _delivered(_kept_here(stream.num_blocks, kept), known, between):
        if part is not None:
            found[block] = part
            _tell(others_have, stream, block)
    # Rank 0 alone has the parts, and with them knows which of the files are damaged.
    missing: list[int] = collectives.broadcast_object([n for n in range(stream.num_blocks) if n not in found])
    if len(missing) < stream.num_blocks:
        have = stream.num_blocks - len(missing)
        get_logger().info(f"{have} of {stream.num_blocks} parts were measured before; the others follow")
    mine = missing[collectives.rank() :: collectives.world_size()]
    blocks = stream.read(mine)

    def one(number: int) -> Part:
        block = next(blocks)
        assert block.number == number, "blocks come in the order in which they were asked for"
        census = block.census
        stream.check(census)
        if block.images is None:
            return census
        try:
            measured = measure(block)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{len(block.numbers)} images at once do not fit into the device's memory "
                f"({str(error).splitlines()[0].rstrip('.')}); give a smaller --batch"
            ) from None
        part = Part(census.tensors | measured.tensors, census.values | measured.values)
        kept.put(number, part)
        return part

    for block, part in _delivered(mine, one, between):
        assert part is not None
        found[block] = part
        if block not in mine:
            _tell(others_have, stream, block)
    if collectives.rank() != 0:
        return []
    parts = [found[number] for number in range(stream.num_blocks)]
    for number, part in enumerate(parts):
        stream.take(part, was_kept=number not in missing)
    return parts


def _tell(others_have: Callable[[int], None] | None, stream: MeasuredImages[Any], block: int) -> None:
    if others_have is not None:
        others_have(len(stream.places(block)))


def _kept_here(num_blocks: int, kept: PartFolder) -> list[int]:
    """Blocks whose files this rank is to read: each is one rank's that sees it, in turns where several do."""
    seen = [set(blocks) for blocks in collectives.gather_objects(kept.blocks())]
    readers = {n: [rank for rank, blocks in enumerate(seen) if n in blocks] for n in range(num_blocks)}
    here = collectives.rank()
    return [n for n, ranks in readers.items() if ranks and ranks[n % len(ranks)] == here]


def _delivered(
    mine: Iterable[int], get: Callable[[int], Part | None], between: Callable[[], object] | None
) -> Iterator[tuple[int, Part | None]]:
    """Numbers and parts of all ranks' blocks, on rank 0, round by round; nothing on the others.

    Raises: an error of any rank, on all ranks. Collective: all ranks.
    """
    rounds = max(collectives.gather_objects(len(list(mine))))
    for _, number in zip_longest(range(rounds), mine):

        def one(number: int | None = number) -> Part | None:
            if between is not None:
                between()
            return None if number is None else get(number)

        part = agreed(one)
        for other in collectives.gather_on_main(None if number is None else (number, part)):
            if other is not None:
                yield other
