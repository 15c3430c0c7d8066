"""Hydra -> typed configuration: `load_config(["experiment=demo_text", "zero.stage=2"])`.

Hydra composes the files (train.yaml, the groups, the experiment) and nothing more: no run folder, no logging set-up,
no interpolation, no `_target_`. Overrides of single values are applied here instead of by Hydra, for two reasons:
an unknown key gets a one-line answer with the nearest known key, and text (paths, prompts) is taken as it stands,
while Hydra's grammar would trip over a comma, a parenthesis or an equals sign in it. What that costs: Hydra's
`+key=`, `~key` and sweeps do not exist here; the tree is closed, so there is nothing to add or to delete.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_scale.config.convert import config_from_dict, key_type, unknown_key_error
from ldm_scale.config.origin import GROUPS, begun_tree
from ldm_scale.config.schema import Config
from ldm_scale.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def load_config(overrides: Sequence[str]) -> Config:
    """The configuration of one run: train.yaml, then the groups and the experiment chosen, then single values.

    Each override is `group=name` (experiment=demo_text, model=sd1) or `key=value` (zero.stage=2). Values are put in
    place in their order: the later one wins, and `unet={...}` leaves what it does not name. `experiment` and, where it
    is not set, `run_dir` (runs/<experiment>) are filled in. With `init` the networks are those of the model there: they
    win over the files, single values win over them.

    Raises: ConfigError in one line: key, value, rule, fix; CheckpointError if `init` names no model.
    """
    if not CONFIG_DIR.is_dir():
        raise ConfigError(
            f"there is no folder {CONFIG_DIR}: ldm-scale runs from a checkout of its repository; install it there "
            "with `make env` or `pip install --editable .`"
        )
    choices, values = _parse(overrides)
    files = _compose(choices)
    config = _with_values(files, values, choices)
    if not config.init or config.stage not in GROUPS:
        return config
    for group in GROUPS[config.stage]:
        if group in choices:
            raise ConfigError(
                f"{group}={choices[group]} beside init={config.init}: init gives the networks of stage={config.stage}; "
                f"leave {group} out, or set single keys"
            )
    # Reading weights needs torch, which a configuration alone does not.
    from ldm_scale.interchange.initial import networks_of_origin

    return _with_values(begun_tree(files, config, networks_of_origin(config)), values, choices)


def list_groups() -> list[str]:
    """The config groups: the folders of configs/."""
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())


def list_choices(group: str) -> list[str]:
    """The names that a group offers: the files of its folder."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def list_experiments() -> list[str]:
    """The names that `experiment=` takes."""
    return list_choices("experiment")


def _parse(overrides: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, Any]]]:
    """The group choices, and the single values in their order."""
    choices: dict[str, str] = {}
    values: list[tuple[str, Any]] = []
    groups = list_groups()
    for override in overrides:
        key, equals, text = override.partition("=")
        if key[:1] in ("+", "~"):
            raise ConfigError(f"{override!r}: no key can be added or deleted; write {override.lstrip('+~')}")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise ConfigError(f"{override!r}: an override is key=value, such as experiment=demo_text or zero.stage=2")
        if key in groups and not text.startswith("{"):
            choices[key] = _checked_choice(key, text)
        else:
            values.append((key, _parse_value(key, text)))
    return choices, values


def _with_values(files: dict[str, Any], values: Sequence[tuple[str, Any]], choices: dict[str, str]) -> Config:
    """What the files say, changed by single values; `files` stay as they are."""
    tree = copy.deepcopy(files)
    for key, value in values:
        _set(tree, key, value)
    if "experiment" in choices:
        tree["experiment"] = choices["experiment"]
    config = config_from_dict(tree)
    if config.experiment and not config.run_dir:
        config = dataclasses.replace(config, run_dir=f"runs/{config.experiment}")
    return config


def _checked_choice(group: str, name: str) -> str:
    names = list_choices(group)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {group}={near[0]}? " if near else ""
        raise ConfigError(f"{group}={name}: there is no configs/{group}/{name}.yaml; {hint}choose {', '.join(names)}")
    return name


def _parse_value(key: str, text: str) -> Any:
    """The value of `key=text`: text where the schema wants text, otherwise what Hydra's grammar reads."""
    wanted = key_type(key)
    if wanted is None:
        raise unknown_key_error(key, text)
    if wanted is str or (wanted == (str | None) and text != "null"):
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
        return text[1:-1] if quoted else text
    if dataclasses.is_dataclass(wanted) and key == "unet" and not text.startswith("{"):
        raise ConfigError(f"unet={text}: unet is a section; choose a file of configs/model with model={text}")
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key}={text}: cannot be read ({reason}); put the value in quotes") from error
    if parsed.is_sweep_override():
        raise ConfigError(f"{key}={text}: must be one value; write a list as {key}=[{text}]")
    # The grammar marks quoted text by a type of its own; the round trip through OmegaConf leaves plain values.
    return OmegaConf.to_container(OmegaConf.create({"value": parsed.value()}), resolve=False)["value"]  # type: ignore[index,call-overload]


def _compose(choices: dict[str, str]) -> dict[str, Any]:
    """The tree of configs/train.yaml with the groups chosen, as plain dictionaries."""
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = hydra.compose("train", overrides=[f"{group}={name}" for group, name in choices.items()])
        tree = OmegaConf.to_container(composed, resolve=False, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        chosen = ", ".join(f"{group}={name}" for group, name in choices.items()) or "train.yaml"
        raise ConfigError(f"configs/ cannot be composed for {chosen}: {reason}; correct the file it names") from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key; a dictionary is merged into its section."""
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = _section(tree, parent)
    if isinstance(value, dict):
        section = _section(tree, leaf)
        for name, item in value.items():
            _set(section, str(name), item)
    else:
        tree[leaf] = value


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the tree, put there if it is absent or null (as a kind of conditioning that is not chosen)."""
    if tree.get(name) is None:
        tree[name] = {}
    section: dict[str, Any] = tree[name]
    return section
