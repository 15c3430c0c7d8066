"""What a run that begins with given weights takes from where they come from, and what must be as it is there.

Three kinds of keys: those that give the networks their shapes and their input its meaning are the source's; those of
training alone (dropout, what is dropped or simulated) are the run's; files may lie elsewhere. What the network's output
means can be learnt anew: a run may set it otherwise, and is told so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config
from ldm_scale.errors import ConfigError

# Of `diffusion`: the noise that the network was trained on, and what its output means.
PROCESS_KEYS = (
    "prediction",
    "num_timesteps",
    "schedule",
    "beta_start",
    "beta_end",
    "zero_terminal_snr",
    "sigma_data",
)
FILE_KEYS = frozenset({"weights", "vocabulary"})  # of `conditioning`: files, which may move
TRAINING_KEYS = frozenset({"dropout", "drop_probability", "degradation", "masks"})  # what training draws at random
GROUPS = {"autoencoder": ("autoencoder",), "diffusion": ("autoencoder", "model", "conditioning", "diffusion")}
_MOST_NAMED = 4

Plain = dict[str, Any]


def begun_tree(tree: Mapping[str, Any], mine: Config, source: Config) -> Plain:
    """`tree`, the files' part of a configuration, with the networks of `source`; `mine` is what it was without them.

    Its artifact comes with them; of `sampling` it gives what no file names.
    """
    theirs, own = config_to_dict(source), config_to_dict(mine)
    begun = dict(tree) | {"autoencoder": theirs["autoencoder"]}
    if mine.stage != "diffusion":
        return begun
    begun["unet"] = theirs["unet"] | _of_training(own["unet"])
    begun["conditioning"] = {
        kind: None if section is None else section | _of_training(own["conditioning"][kind] or {})
        for kind, section in theirs["conditioning"].items()
    }
    begun["diffusion"] = dict(tree.get("diffusion") or {}) | {key: theirs["diffusion"][key] for key in PROCESS_KEYS}
    defaults = {key: value for key, value in theirs["sampling"].items() if key != "prompts"}
    begun["sampling"] = defaults | dict(tree.get("sampling") or {})
    return begun | {"artifact": source.artifact}


def require_same_networks(config: Config, source: Config) -> None:
    """Returns if the weights of `source` fit the networks of `config` and mean the same there.

    Raises: ConfigError that names the keys, with the values of both.
    """
    sections = ("autoencoder",) if config.stage == "autoencoder" else ("unet", "conditioning")
    differences = [
        f"{key}={_shown(mine)} (there: {_shown(theirs)})"
        for section in sections
        for key, mine, theirs in _differences(getattr(config, section), getattr(source, section), section)
    ]
    if differences:
        more = f" and {len(differences) - _MOST_NAMED} more" if len(differences) > _MOST_NAMED else ""
        raise ConfigError(
            f"init={config.init}: its weights are those of another network than the configured one, "
            f"{', '.join(differences[:_MOST_NAMED])}{more}; leave these keys out: init gives them"
        )


def process_differences(config: Config, source: Config) -> list[str]:
    """In which keys noise or output mean something else than where the weights were trained, both values named."""
    pairs = ((key, getattr(config.diffusion, key), getattr(source.diffusion, key)) for key in PROCESS_KEYS)
    return [f"diffusion.{key}={_shown(a)} (there: {_shown(b)})" for key, a, b in pairs if a != b]


def _of_training(section: Plain) -> Plain:
    return {key: value for key, value in section.items() if key in TRAINING_KEYS}


def _differences(mine: object, theirs: object, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Keys in which two sections differ, but for those of training and of files."""
    a, b = _defining(mine, prefix), _defining(theirs, prefix)
    for key in a | b:
        section = key.rpartition(".")[0]  # of a kind that one of them lacks, that is said alone
        if a.get(key) != b.get(key) and a.get(section) == b.get(section):
            yield key, a.get(key), b.get(key)


def _defining(section: object, prefix: str) -> Plain:
    """The keys that define networks; a kind of conditioning that is absent has the value None itself."""
    found: Plain = {}
    for key, value in config_to_dict(section).items():
        if isinstance(value, dict):
            free = TRAINING_KEYS | FILE_KEYS
            found[f"{prefix}.{key}"] = "set"
            found |= {f"{prefix}.{key}.{name}": item for name, item in value.items() if name not in free}
        elif key not in TRAINING_KEYS:
            found[f"{prefix}.{key}"] = value
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
