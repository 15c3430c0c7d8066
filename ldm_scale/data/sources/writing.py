"""From a source to its shards and their manifest: in parallel, each shard whole or not at all, the manifest last.

The same request gives the same bytes, whatever the number of processes and however often it was interrupted: the items
of a split have a fixed order, shard i is made of its items i * samples_per_shard and up, and holds those that can be
used. There are no times or owners in the tars and no date in the manifest. A folder without a manifest is unfinished
(unfinished.py), and the same request goes on there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from ldm_scale.data.indexing import index_shard
from ldm_scale.data.manifest import FORMAT, VERSION
from ldm_scale.data.shard_files import new_shard
from ldm_scale.data.sidecar import SUFFIX
from ldm_scale.data.sources import (
    HELDOUT,
    MANIFEST_NAME,
    Layout,
    LeftOut,
    Prepared,
    Sample,
    Source,
    find_prepared,
    is_heldout,
)
from ldm_scale.data.sources.unfinished import MAX_NAMED, Record, Unfinished
from ldm_scale.data.sources.workers import count_image, default_workers, map_tasks
from ldm_scale.errors import DataError
from ldm_scale.telemetry.log import get_logger

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Task(Generic[Item]):
    """One shard that is to be made."""

    split: str
    index: int  # in the split
    items: list[tuple[int, Item]]  # with their numbers among all


def _tasks(source: Source[Item], layout: Layout) -> Iterator[_Task[Item]]:
    """The shards in the order in which the source fills them."""
    pending: dict[str, list[tuple[int, Item]]] = {split: [] for split in layout.splits}
    num_shards = Counter[str]()

    def take(split: str) -> _Task[Item]:
        task = _Task(split, num_shards[split], pending[split])
        pending[split] = []
        num_shards[split] += 1
        return task

    for number, item in enumerate(source.items):
        split = HELDOUT if is_heldout(source.family(item), layout.heldout_percent) else layout.split
        pending[split].append((number, item))
        if len(pending[split]) == layout.samples_per_shard:
            yield take(split)
    for split, items in pending.items():
        if items:
            yield take(split)


def _write_shard(task: _Task[Item], unfinished: Unfinished, make: Callable[[Item], Sample | LeftOut]) -> Record:
    """The record of a shard that this writes, in a worker."""
    record = Record(task.split, task.index, len(task.items))

    def samples() -> Iterator[dict[str, Any]]:
        for number, item in task.items:
            made = make(item)
            count_image()
            if isinstance(made, LeftOut):
                record.leave_out(number, made.file, made.reason)
            else:
                yield {"__key__": made.name, **made.members}

    made = samples()
    if (first := next(made, None)) is not None:
        tar = unfinished.out / f"{task.split}-{task.index:06d}.tar"
        with new_shard(tar, chain([first], made), pictures=True) as members:
            pass
        record.row = index_shard(tar, tar.with_suffix(SUFFIX), unfinished.out, members)
    unfinished.finish(record)
    return record


@dataclass
class _Outcome:
    """What is known of the shards that are finished."""

    num_items: int = 0
    rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # by split and number in it
    left_out: Counter[str] = field(default_factory=Counter)
    names: list[tuple[int, str]] = field(default_factory=list)  # the first ones by their items' numbers

    def add(self, record: Record) -> None:
        """Nothing; takes a record in."""
        self.num_items += record.num_items
        if record.row is not None:
            self.rows.setdefault(record.split, {})[record.index] = record.row
        self.left_out.update(record.left_out)
        self.names = sorted(self.names + record.names)[:MAX_NAMED]

    def splits(self, layout: Layout) -> dict[str, Any]:
        """The manifest's entry of each split.

        Raises: DataError if one has no sample.
        """
        splits: dict[str, Any] = {}
        for split in layout.splits:
            found = self.rows.get(split, {})
            rows = [found[index] for index in sorted(found)]
            if not rows:
                raise DataError(
                    f"no sample falls into the split {split!r} with --heldout-percent {layout.heldout_percent:g} (a "
                    "hash of each name decides, so a small data set may have none): give a larger share, such as "
                    "--heldout-percent 30, or --heldout-percent 0 and train with data.validation_split="
                )
            splits[split] = {"num_samples": sum(row["num_samples"] for row in rows), "shards": rows}
        return splits

    def discard(self, unfinished: Unfinished) -> None:
        """Nothing; the finished shards are gone, and all that is known of them."""
        unfinished.discard(row for rows in self.rows.values() for row in rows.values())


def write_dataset(
    out: Path, request: dict[str, Any], describe: dict[str, Any], source: Source[Any], layout: Layout
) -> Prepared:
    """The data set at `out`, made by several processes, from where an earlier run of this request ended.

    `describe` gives the manifest's entries besides the splits; where it has "left_out" and "left_out_names", what was
    left out here is added.

    Raises: DataError if another process makes it, no item can be used, a split that was asked for gets no sample, or
    it cannot be written.
    """
    unfinished, outcome = Unfinished(out), _Outcome()
    try:
        with unfinished.alone():
            if (found := find_prepared(out, request)) is not None:
                return found
            unfinished.begin(request, describe.get("made_with", {"pillow": version("pillow")}))
            try:
                _write_shards(unfinished, source, layout, outcome)
            except BaseException:
                unfinished.discard()
                raise
            try:
                manifest = _manifest(describe, source, layout, outcome)
            except DataError:
                outcome.discard(unfinished)
                raise
            unfinished.publish(manifest)
            return Prepared(out / MANIFEST_NAME, manifest, reused=False)
    except KeyboardInterrupt:
        get_logger().warning(f"{out}: {outcome.num_items} images are done; the same command goes on from there")
        raise
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); {outcome.num_items} images are done: make room or set it "
            "right, and the same command goes on from there"
        ) from None


def _write_shards(unfinished: Unfinished, source: Source[Any], layout: Layout, outcome: _Outcome) -> None:
    """Nothing; every shard is finished, and its record is in the outcome."""
    found = 0  # images of shards that an earlier run has finished

    def tasks() -> Iterator[_Task[Any]]:
        nonlocal found
        for task in _tasks(source, layout):
            record = unfinished.find(task.split, task.index)
            if record is None:
                yield task
            else:
                found += record.num_items
                outcome.add(record)

    work = partial(_write_shard, unfinished=unfinished, make=source.make)
    num_workers = layout.num_workers or default_workers()
    records = map_tasks(work, tasks(), num_workers, total=source.num_items, done=lambda: found)
    with closing(records):
        for record in records:
            outcome.add(record)


def _manifest(describe: dict[str, Any], source: Source[Any], layout: Layout, outcome: _Outcome) -> dict[str, Any]:
    """The manifest of a data set whose shards are finished.

    Raises: DataError if no item could be used, or a split has no sample.
    """
    if not outcome.rows:
        first = outcome.names[0][1] if outcome.names else "it has none"
        raise DataError(f"{source.name}: none of {outcome.num_items} images can be used; {first}")
    described = dict(describe)
    if "left_out" in described:
        described["left_out"] = {**dict(sorted(outcome.left_out.items())), **described["left_out"]}
    if "left_out_names" in described:
        described["left_out_names"] = [text for _, text in outcome.names]
    return {"format": FORMAT, "version": VERSION, **described, "splits": outcome.splits(layout)}
