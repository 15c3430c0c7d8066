"""What a sample of a split looks like: pictures that do not decode, captions, classes, repeated pictures.

Boxes and label maps, and what is told in distributions, have files of their own beside this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from time import perf_counter
from typing import Any

from PIL import Image

from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.data import NO_CLASS, Dataset
from ldm_scale.data.decode import image_extension
from ldm_scale.data.metadata import member_bytes, read_caption, read_label, read_metadata
from ldm_scale.data.pictures import open_rgb
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS, RawSample
from ldm_scale.errors import DataError
from ldm_scale.operations.doctor_annotations import AnnotationTally, SeenAnnotations, inspect_annotations
from ldm_scale.operations.doctor_duplicates import NO_FINGERPRINT, Fingerprint, fingerprint
from ldm_scale.operations.doctor_figures import Figures
from ldm_scale.operations.doctor_report import Report

BAD_SHARE_ERROR = 0.01  # of samples that cannot be used; below, training replaces and counts them
DUPLICATE_CAPTION_SHARE = 0.5  # of samples whose caption another has: above, the captions say little
IMBALANCE = 20.0  # samples of the most frequent class per sample of the rarest
MAX_TOKENS = TextConditioningConfig().max_tokens


@dataclass(frozen=True)
class Seen:
    """One sample as a worker saw it. `reason` says why it cannot be used; the rest is then empty."""

    number: int
    key: str
    reason: str = ""
    broken: bool = False  # the shard is not what its index says, rather than the sample
    size: tuple[int, int] = (0, 0)  # (width, height), upright
    pixels: bytes = b""  # digest of the decoded picture
    fingerprint: Fingerprint = NO_FINGERPRINT
    caption: str | None = None  # None: there is none; "" is an empty one
    label: int = NO_CLASS
    annotations: SeenAnnotations = field(default_factory=SeenAnnotations)
    num_bytes: int = 0  # that were read for it
    read_s: float = 0.0


_looked_at: list[Dataset] = []  # what forked workers look into: samples are named to them by number


@contextmanager
def inspecting(dataset: Dataset) -> Iterator[None]:
    """Inside the block, processes that are forked look into `dataset`."""
    _looked_at.append(dataset)
    try:
        yield
    finally:
        _looked_at.pop()


def inspect_sample(number: int) -> Seen:
    """What sample `number` of the data set under inspection is."""
    dataset = _looked_at[-1]
    started = perf_counter()
    try:
        raw = dataset.read(number)
    except DataError as error:
        return Seen(number, dataset.key(number), str(error), broken=True)
    read_s = perf_counter() - started
    num_bytes = sum(len(member) for name, member in raw.items() if name != "__key__")
    return replace(_inspect(number, raw, dataset), num_bytes=num_bytes, read_s=read_s)


def _inspect(number: int, raw: RawSample, dataset: Dataset) -> Seen:
    key = str(raw["__key__"])
    try:
        metadata = read_metadata(raw)
        caption = read_caption(raw, metadata)
        label = read_label(raw, metadata, {name: row for row, name in enumerate(dataset.class_names)})
        image = open_rgb(_picture(raw))
    except BadSample as error:
        return Seen(number, key, str(error))
    has_caption = "txt" in raw or metadata.get("caption") is not None or bool(metadata.get("captions"))
    pixels = blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
    annotations = inspect_annotations(raw, metadata, image.size, dataset)
    return Seen(
        number,
        key,
        size=image.size,
        pixels=pixels,
        fingerprint=fingerprint(image),
        caption=caption if has_caption else None,
        label=label,
        annotations=annotations,
    )


def picture_of(raw: RawSample) -> tuple[Image.Image, str]:
    """A sample's picture and caption. Raises: BadSample if it has none or they cannot be read."""
    return open_rgb(_picture(raw)), read_caption(raw, read_metadata(raw))


def _picture(raw: RawSample) -> bytes:
    """The bytes of a sample's picture. Raises: BadSample if it has none."""
    extension = image_extension(raw)
    if extension is None:
        raise BadSample(f"no image ({', '.join(IMAGE_EXTENSIONS)})")
    return member_bytes(raw, extension)


@dataclass
class SampleTally:
    """Counts over the samples of a split, and what they say."""

    dataset: Dataset
    resolution: int
    label: str  # what is looked at, in findings
    left_out: Counter[str] = field(default_factory=Counter)  # by the index: reason -> samples or members
    seen: int = 0
    num_read: int = 0
    num_bytes: int = 0
    read_s: float = 0.0
    broken: dict[str, str] = field(default_factory=dict)  # key -> what is wrong with the shard there
    bad: dict[str, str] = field(default_factory=dict)  # key -> reason
    figures: Figures = field(init=False)
    missing: list[str] = field(default_factory=list)  # keys without a caption
    empty: list[str] = field(default_factory=list)
    long: list[tuple[str, int]] = field(default_factory=list)  # key, tokens
    captions: Counter[bytes] = field(default_factory=Counter)  # by digest
    labels: Counter[int] = field(default_factory=Counter)
    pixels: dict[bytes, str] = field(default_factory=dict)  # digest -> first key
    twins: list[tuple[str, str]] = field(default_factory=list)  # key, key of an equal picture before it
    annotations: AnnotationTally = field(init=False)
    _texts: dict[str, str] = field(default_factory=dict)  # key -> caption that waits for the tokenizer

    def __post_init__(self) -> None:
        self.figures = Figures(self.dataset, self.resolution)
        self.annotations = AnnotationTally(self.dataset, self.label)

    @property
    def usable(self) -> int:
        """Samples that training could show."""
        return len(self.figures)

    def add(self, sample: Seen) -> None:
        """Nothing; takes a sample in."""
        self.seen += 1
        self.num_read += not sample.broken
        self.num_bytes += sample.num_bytes
        self.read_s += sample.read_s
        if sample.reason:
            (self.broken if sample.broken else self.bad)[sample.key] = sample.reason
            return
        self.figures.add(sample)
        self.labels[sample.label] += 1
        self.annotations.add(sample.key, sample.annotations)
        if self.pixels.setdefault(sample.pixels, sample.key) != sample.key:
            self.twins.append((sample.key, self.pixels[sample.pixels]))
        if sample.caption is None:
            self.missing.append(sample.key)
        elif not sample.caption:
            self.empty.append(sample.key)
        else:
            self.captions[blake2b(sample.caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()] += 1
            # Fewer characters than tokens do not exist: short captions need no tokenizer, which takes seconds to load.
            if len(sample.caption) > MAX_TOKENS - 2:
                self._texts[sample.key] = sample.caption
            if len(self._texts) >= 4096:
                self._count_tokens()

    def _count_tokens(self) -> None:
        """Nothing; notes which of the waiting captions are longer than the text encoder reads."""
        if not self._texts:
            return
        from ldm_scale.conditioning.tokenizers import clip_tokenizer

        encode = clip_tokenizer().encode
        lengths = {key: len(encode(text)) + 2 for key, text in self._texts.items()}  # and start and end
        self.long += [(key, length) for key, length in lengths.items() if length > MAX_TOKENS]
        self._texts.clear()

    def judge(self, report: Report, max_named: int) -> None:
        """Nothing; the report says what was found, with at most `max_named` samples of each kind by name."""
        self._count_tokens()
        self._judge_decoding(report, max_named)
        if not self.usable:
            return
        self.figures.judge(report, self.label)
        self._judge_captions(report, max_named)
        self._judge_classes(report)
        self.annotations.judge(report, max_named)
        for key, twin in self.twins[:max_named]:
            report.warning(f"the same pixels as {twin}", self._place(key), "remove one, or let it count twice")
        if len(self.twins) > max_named:
            report.warning(f"{len(self.twins)} repeated pictures in all", self.label)

    def _judge_decoding(self, report: Report, max_named: int) -> None:
        if self.left_out:
            total = self.left_out.total()
            share = total / (total + self.dataset.num_samples)
            kinds = ", ".join(f"{count} x {reason}" for reason, count in self.left_out.most_common())
            where = "bad_samples.jsonl beside the manifest names them" if share > BAD_SHARE_ERROR else ""
            report.warning(f"the index left out {total:,} samples or members ({share:.2%}): {kinds}", self.label, where)
        for key, reason in list(self.broken.items())[:max_named]:
            report.error(reason, self._place(key))
        share = len(self.bad) / max(1, self.seen)
        note = report.error if share > BAD_SHARE_ERROR else report.warning
        for key, reason in list(self.bad.items())[:max_named]:
            note(reason, self._place(key), "repair or remove it")
        if self.bad or self.broken:
            kinds = ", ".join(f"{n} x {reason}" for reason, n in Counter(self.bad.values()).most_common())
            note(
                f"{len(self.bad)} of {self.seen} samples cannot be used ({share:.2%}{': ' * bool(kinds)}{kinds}); "
                f"{len(self.broken)} lie in damaged shards",
                self.label,
            )
        else:
            report.ok(f"{self.seen} of {self.dataset.num_samples:,} samples decoded, all usable", self.label)

    def _judge_captions(self, report: Report, max_named: int) -> None:
        split, some = self.label, self.usable
        if len(self.missing) == some:
            report.warning(f"none of {some} samples has a caption", split, "enough for stage 1 and for classes")
            return
        for kind, keys in (("no caption", self.missing), ("empty caption", self.empty)):
            for key in keys[:max_named]:
                report.warning(kind, self._place(key), "write one as NAME.txt")
            if keys:
                report.warning(f"{kind} in {len(keys)} of {some} samples ({len(keys) / some:.1%})", split)
        for key, length in self.long[:max_named]:
            report.warning(
                f"caption of {length} tokens, of which the text encoder reads {MAX_TOKENS}", self._place(key)
            )
        if self.long:
            report.warning(f"{len(self.long)} of {some} captions are cut", split, "put first what matters")
        repeated = sum(count for count in self.captions.values() if count > 1)
        if repeated > DUPLICATE_CAPTION_SHARE * some:
            report.warning(
                f"{repeated} of {some} samples share their caption with another; {len(self.captions)} are distinct",
                split,
            )
        elif not (self.missing or self.empty or self.long):
            report.ok(f"captions: all there, {len(self.captions)} distinct, none over {MAX_TOKENS} tokens", split)

    def _judge_classes(self, report: Report) -> None:
        names, split = self.dataset.class_names, self.label
        if not names:
            report.ok("the manifest lists no classes", split)
            return
        counts = {label: count for label, count in self.labels.items() if label != NO_CLASS}
        without = self.labels[NO_CLASS]
        if without:
            report.warning(f"{without} of {self.usable} samples have no class; the manifest lists {len(names)}", split)
        if not counts:
            return
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        ratio = counts[most] / counts[least]
        absent = len(names) - len(counts)
        text = (
            f"{len(counts)} of {len(names)} classes in the sample, {counts[least]} ({names[least]}) to {counts[most]} "
            f"({names[most]}) samples each"
        )
        if ratio > IMBALANCE:
            report.warning(f"{text}: {ratio:.0f} times as many", split, "the rare ones are hardly learned")
        elif absent and self.seen == self.dataset.num_samples:
            report.warning(f"{text}; {absent} classes have no sample", split)
        else:
            report.ok(text, split)

    def facts(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "sampled": self.seen,
            "usable": self.usable,
            "left_out_by_index": dict(self.left_out.most_common()),
            "bad": dict(Counter(self.bad.values())),
            "in_damaged_shards": len(self.broken),
            **self.figures.facts(),
            "captions_missing": len(self.missing),
            "captions_empty": len(self.empty),
            "captions_too_long": len(self.long),
            "captions_distinct": len(self.captions),
            "classes": {self.dataset.class_names[n]: c for n, c in sorted(self.labels.items()) if n != NO_CLASS},
            "without_class": self.labels[NO_CLASS],
            "repeated_pictures": len(self.twins),
            "read_mib_per_s_per_process": round(self.num_bytes / 2**20 / self.read_s, 1) if self.read_s else None,
            **self.annotations.facts(),
        }

    def _place(self, key: str) -> str:
        """Where a sample is: its split and its key, whose first part is the shard."""
        return f"{self.label} {key}"
