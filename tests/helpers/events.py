"""Event files of TensorBoard written anew, with other pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def rewrite_pictures(folder: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Nothing; every picture of the folder's event files is what `change` makes of its name and its bytes."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in list(folder.glob("*tfevents*")):
        events = list(LegacyEventFileLoader(str(path)).Load())
        with path.open("wb") as file:
            writer = RecordWriter(file)
            for event in events:
                for value in event.summary.value:
                    if value.HasField("image"):
                        value.image.encoded_image_string = change(value.tag, value.image.encoded_image_string)
                writer.write(event.SerializeToString())
            writer.flush()
