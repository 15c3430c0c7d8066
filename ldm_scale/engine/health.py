"""Checks that keep ranks that drifted apart out of the weights.

Ranks that disagree train on without an error and end in a model that is worse than one rank's. `check_ranks` compares
them: whatever is a full copy on every rank must be equal bit for bit, whatever is divided must be held once, and no
image may be in two ranks' batches. Each rank reduces a tensor to one 64-bit number where it lies; one gather carries
the numbers' digest, a second the numbers themselves, but only where the digests differ, which all ranks see alike.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_scale.engine import collectives
from ldm_scale.engine.checkpoint import BUFFER, Trained
from ldm_scale.engine.zero import MOMENTS
from ldm_scale.errors import NumericsError

SECOND_MOMENT = MOMENTS[1]
_WORD, _COLUMNS = 8, 1024  # bytes of an integer, integers of a row
_FACTORS = (0x9E3779B97F4A7C1, 0x2B2AE3D27D4EB4F, 0x165667B19E3779F)
_Piece = tuple[int, int, int]  # first element, length, rank


@dataclass(frozen=True)
class RankBatch:
    """What a rank is about to train on: its images' places in the global stream, and their keys."""

    image_numbers: Sequence[int]
    keys: Sequence[str]
    num_samples: int  # of the data set: a key may come again only in another epoch


def check_ranks(trained: Mapping[str, Trained], batch: RankBatch, images: int) -> None:
    """Returns if the ranks are replicas of one run, as far as they should be, and their batches differ.

    That they were started alike has been seen when they met (engine/rendezvous.py). What is compared, bit for bit:
    - parameters that compute and buffers (at stage 3 the parameters are divided, so buffers alone);
    - stage 0: masters, Adam's moments, all averages; stages 1 to 3: that every element of them is on one rank;
    - stages 1 to 3: this rank's masters, rounded, with what it has of the parameters that compute.
    What has no copy (masters' last bits, moments and averages at stages 1 to 3) must at least be possible: finite, and
    no second moment below zero.
    Raises: NumericsError on all ranks, naming ranks and the first tensor.
    Collective: all ranks.
    """
    if collectives.world_size() == 1:
        return
    numbers = {name: number for label, item in trained.items() for name, number in _checksums(label, item)}
    wrong = [text for label, item in trained.items() for text in _wrong_values(label, item)]
    pieces = {label: _pieces(item) for label, item in trained.items() if item.model.stage > 0}
    digest = hashlib.blake2b(repr(sorted(numbers.items())).encode(), digest_size=16).hexdigest()
    reports = collectives.gather_objects((batch, digest, wrong[:1], pieces))
    batches, digests, all_wrong, all_pieces = zip(*reports, strict=True)
    where = f"at {images} images"
    if len(set(digests)) > 1:
        _name_first_difference(collectives.gather_objects(numbers), where)
    for rank, texts in enumerate(all_wrong):
        if texts:
            raise NumericsError(
                f"{where}: on rank {rank} {texts[0]}; continue from the last checkpoint, and if it comes again at the "
                "same rank, suspect its hardware"
            )
    for label, item in trained.items():
        if item.model.stage > 0:
            _require_cover(label, item.model.parameter_shapes, [given[label] for given in all_pieces], where)
    _require_different_batches(batches, where)


def checksum(x: Tensor) -> int:
    """64 bits that change with any bit of x, and with the places of its elements.

    Sums of the bits, read as integers modulo 2^64: exact in any order of summation, and without a copy of x.
    """
    flat = x.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % _WORD:
        flat = flat.clone()  # words can be read only from their multiples
    octets = flat.view(torch.uint8)
    whole = octets.numel() // (_WORD * _COLUMNS) * _COLUMNS
    table = octets[: whole * _WORD].view(torch.int64).view(-1, _COLUMNS)
    rest = octets[whole * _WORD :].to(torch.int64)
    # Odd and different factors for rows, columns and the rest, so that no move between them cancels.
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for part, factor in zip((table.sum(dim=1), table.sum(dim=0), rest), _FACTORS, strict=True):
        places = torch.arange(1, len(part) + 1, device=x.device, dtype=torch.int64)
        total += (part * (places * factor + 1)).sum()
    return int(total)


def _checksums(label: str, item: Trained) -> Iterator[tuple[str, int]]:
    """Name and checksum of every tensor that must be the same on all ranks, in one order on all of them."""
    module = item.model.module
    if item.model.stage < 3:
        for name, parameter in module.named_parameters():
            yield f"{label}/parameter/{name}", checksum(parameter)
    for name, buffer in (dict(module.named_buffers()) | item.buffers).items():
        yield f"{label}/{BUFFER}/{name}", checksum(buffer)
    if item.model.stage == 0:
        for fragment, kind, value in item.tensors():
            yield f"{label}/{kind}/{fragment.name}", checksum(value)


def _wrong_values(label: str, item: Trained) -> Iterator[str]:
    """Parameters that compute with something else than this rank's masters, and values that cannot be, in words."""
    if item.model.stage == 0:
        return
    parameters = dict(item.model.module.named_parameters())
    for fragment in item.model.fragments:
        weight = item.model.kept_weight(parameters[fragment.name]).detach().view(-1)
        offset = 0 if item.model.stage == 3 else fragment.offset
        weight = weight[offset : offset + fragment.length]
        # Bits, so that NaN equals itself.
        if checksum(fragment.master.to(weight.dtype)) != checksum(weight):
            yield (
                f"{label}/parameter/{fragment.name} is not what its fp32 masters say, so the rank computes with other "
                "weights than it trains"
            )
    for fragment, kind, values in item.tensors():
        least, largest = (float(value) for value in values.aminmax()) if values.numel() else (0.0, 0.0)
        if not math.isfinite(least) or not math.isfinite(largest) or (kind == SECOND_MOMENT and least < 0.0):
            yield f"{label}/{kind}/{fragment.name} has values that cannot be ({least:g} to {largest:g})"


def _pieces(item: Trained) -> dict[str, tuple[int, int]]:
    """First element and length of this rank's part of each parameter."""
    return {fragment.name: (fragment.offset, fragment.length) for fragment in item.model.fragments}


def _name_first_difference(numbers: Sequence[Mapping[str, int]], where: str) -> None:
    """Raises: NumericsError always."""
    names = list(numbers[0])
    assert all(list(given) == names for given in numbers), "the ranks hold tensors of different names"
    different = [name for name in names if len({given[name] for given in numbers}) > 1]
    groups = _ranks_by([given[different[0]] for given in numbers])
    raise NumericsError(
        f"{where}: ranks disagree about {different[0]}, the first of {len(different)} tensors of {len(names)}: "
        f"{_described(groups)}; the run is no longer one model. Continue from a checkpoint before; if it comes again "
        "at the same rank, suspect its hardware, else code that changes weights on some ranks only"
    )


def _require_cover(
    label: str,
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Sequence[Mapping[str, tuple[int, int]]],
    where: str,
) -> None:
    """Returns if every element of every parameter is in one rank's pieces."""
    pieces: defaultdict[str, list[_Piece]] = defaultdict(list)
    for rank, given in enumerate(ranks):
        for name, (offset, length) in given.items():
            pieces[name].append((offset, length, rank))
    for name, shape in shapes.items():
        end, last = 0, "no rank"
        for offset, length, rank in [*sorted(pieces[name]), (math.prod(shape), 0, -1)]:
            if offset != end:
                trouble = f"begins before {last}'s piece ends" if offset < end else f"leaves a gap behind {last}'s"
                holder = f"the piece of rank {rank}" if rank >= 0 else "the parameter's end"
                raise NumericsError(
                    f"{where}: {label}/{name} is not divided among the ranks: at element {min(offset, end)} {holder} "
                    f"{trouble}; start all ranks by one command, with one zero.stage"
                )
            end, last = offset + length, f"rank {rank}"


def _require_different_batches(batches: Sequence[RankBatch], where: str) -> None:
    owners: dict[int, int] = {}
    fix = "start each rank with its own RANK; a loader must be told its rank and the number of ranks"
    for rank, batch in enumerate(batches):
        for number in batch.image_numbers:
            other = owners.setdefault(number, rank)
            if other != rank:
                raise NumericsError(f"{where}: ranks {other} and {rank} both train on image {number} of the run; {fix}")
    # Keys may meet at a replacement of a bad sample, and in other epochs, but hardly a whole batch of them.
    contents = [
        (tuple(batch.keys), batch.image_numbers[0] // batch.num_samples) if len(batch.keys) > 1 else rank
        for rank, batch in enumerate(batches)
    ]
    for group in _ranks_by(contents):
        if len(group) > 1:
            names, first = " and ".join(map(str, group)), batches[group[0]].keys[0]
            raise NumericsError(f"{where}: ranks {names} train on the same samples, {first} ...; {fix}")


def _ranks_by(values: Sequence[Hashable]) -> list[list[int]]:
    """Ranks with equal values, the largest group first."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        groups[value].append(rank)
    return sorted(groups.values(), key=len, reverse=True)


def _described(groups: Sequence[Sequence[int]]) -> str:
    """Such as "rank(s) 1, 2 against 0"."""
    shown = [", ".join(map(str, group[:8])) + (" ..." if len(group) > 8 else "") for group in groups]
    return "rank(s) " + " against ".join(shown)
