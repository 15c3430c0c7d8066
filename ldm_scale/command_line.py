"""What all command lines have in common: errors that show no secret, and results that go to local paths alone."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from ldm_scale.errors import ConfigError
from ldm_scale.redaction import public_name, public_urls

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Parser(argparse.ArgumentParser):
    """argparse's, which repeats what it was given in its errors. Sub-commands get parsers of this class too."""

    def error(self, message: str) -> NoReturn:
        """Ends with the usage, the message and status 2."""
        super().error(public_urls(message))


def output_path(text: str, key: str = "") -> Path:
    """Where a command shall write; `key` is what stands before it in the message.

    Raises: ConfigError if it is a URL, of which a path would make local folders named after its scheme, host and user.
    """
    if _URL.match(text):
        raise ConfigError(
            f"{key}{public_name(text)}: this is a URL, and results are written to local files and folders alone; give "
            "a path, such as one on a mounted file system"
        )
    return Path(text)
