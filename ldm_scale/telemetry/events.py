"""Pictures and texts that a run has written into its TensorBoard folder, read back through TensorBoard's own reader."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ldm_scale.telemetry.tensorboard import CAPTIONS, TENSORBOARD_FOLDER

_TEXT = "/text_summary"  # what torch's writer puts behind a text's name


@dataclass(frozen=True)
class EventPicture:
    """One picture, encoded as it was written (PNG), with the captions of its parts, if it has any."""

    name: str
    images_seen: int
    encoded: bytes
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunEvents:
    """What the event files of a run hold, oldest first."""

    pictures: dict[str, list[EventPicture]] = field(default_factory=dict)  # by name
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # by name: images seen, Markdown
    damage: tuple[str, ...] = ()  # files that end before their end, and where


def read_events(run_dir: Path, pictures_each: int = 8) -> RunEvents:
    """The last picture of each name and a sample of those before, and all texts; empty where there is no folder.

    What an attempt wrote beyond the checkpoint that the next one continued from is left out.
    """
    folder = run_dir / TENSORBOARD_FOLDER
    files = sorted(folder.glob("*tfevents*")) if folder.is_dir() else []
    if not files:
        return RunEvents()
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator

    # 0 is all of them; scalars are read from metrics.jsonl.
    events = EventAccumulator(str(folder), size_guidance={IMAGES: pictures_each, TENSORS: 0, SCALARS: 1}).Reload()
    tags = events.Tags()
    texts = {
        tag.removesuffix(_TEXT): [
            (event.step, event.tensor_proto.string_val[0].decode(errors="replace")) for event in events.Tensors(tag)
        ]
        for tag in tags["tensors"]
        if tag.endswith(_TEXT)
    }
    captions = {name: dict(parts) for name, parts in texts.items() if name.endswith(f"/{CAPTIONS}")}
    pictures = {
        tag: [
            EventPicture(
                tag, event.step, event.encoded_image_string, _listed(captions.get(f"{tag}/{CAPTIONS}", {}), event.step)
            )
            for event in sorted(events.Images(tag), key=lambda event: event.step)
        ]
        for tag in tags["images"]
    }
    return RunEvents(pictures, texts, tuple(text for text in map(_damage, files) if text))


def _listed(lists: dict[int, str], images_seen: int) -> tuple[str, ...]:
    """The captions that `caption_list` made a list of."""
    lines = lists.get(images_seen, "").splitlines()
    return tuple(line.partition(". ")[2] for line in lines)


def _damage(file: Path) -> str:
    """Where the file cannot be read any further; "" where it is whole."""
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader, records = PyRecordReader_New(str(file)), 0
    while True:
        try:
            reader.GetNext()
        except OutOfRangeError:
            return ""
        except DataLossError:
            return f"{file.name} ends within a record or is damaged after {records} of them: what follows is left out"
        records += 1
