"""Runs to report on: both stages, trained for a moment, with texts that try to get into a page as markup."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

from ldm_scale.config.schema import Config
from ldm_scale.engine import env
from ldm_scale.operations.train import train
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import AUTOENCODER, tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset

# Runs, if it is ever markup: as an element, out of an attribute in either quotes, out of a title or a style.
CANARY = (
    "</title></style><script>window.canary = 1</script>'\"><img src=x onerror='window.canary = 1'>"
    "<svg onload='window.canary = 1'> javascript:canary"
)


def trained_run(folder: Path, stage: str) -> Path:
    """The run_dir of a finished run of 32 images with GAN and codes (stage 1), or captions (stage 2)."""
    manifest = make_dataset(folder / "data", num_samples=16, resolution=20)
    train_section = {"total_images": 32, "validate_every_images": 16, "sample_every_images": 16}
    config = tiny_config(
        stage, manifest, folder / stage, train=train_section, sampling={"prompts": (CANARY, "an apple")}
    )
    if stage == "autoencoder":
        config = dataclasses.replace(config, autoencoder=dataclasses.replace(AUTOENCODER, kind="vq", codebook_size=16))
    else:
        tiny_artifact(Path(config.artifact))
    run_ranks(_train, 1, dataclasses.replace(config, experiment=f"{stage} {CANARY}"))
    return Path(config.run_dir)


def _train(config: Config) -> None:
    train(config, env.read_launch())


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, and what a reader sees. Every end must have its start."""

    _VOID = frozenset({"img", "meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"never ended: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> has no start"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "title"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All that is to be read."""
        return "\n".join(self.texts)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of that kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def headings(self) -> list[str | None]:
        """Names of the sections."""
        return [attributes.get("id") for attributes in self.of("section")]
