"""Every key of the configuration as Markdown: what schema.py, ranges.py and the experiments say of it.

A field's description is the comment behind it, after the comment lines directly above it. Experiments are composed
here by the rules that `configs/` keeps to (a list of groups, plain values), because Hydra takes ten seconds for all of
them; a test holds the result against Hydra's.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import io
import tokenize
import types
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, reduce
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ldm_scale.config.compose import CONFIG_DIR, list_experiments
from ldm_scale.config.convert import config_from_dict, field_types
from ldm_scale.config.ranges import bounds
from ldm_scale.config.schema import Config

# Units that the last word of a name stands for; of a `num_` what it counts.
UNITS = {
    "images": "images",
    "batch": "images",
    "steps": "steps",
    "batches": "micro-batches",
    "s": "seconds",
    "gib": "GiB",
    "elements": "elements",
    "tokens": "tokens",
    "threads": "threads per loader process",
    "workers": "processes per rank",
    "samples": "samples",
    "chunks": "chunks",
    "timesteps": "timesteps",
    "resolution": "pixels",
    "channels": "channels",
    "multipliers": "times base_channels",
    "depth": "blocks",
    "width": "numbers per token",
    "heads": "heads",
    "objects": "objects",
    "classes": "classes",
    "labels": "labels",
    "groups": "groups",
    "blocks": "blocks",
    "layers": "layers",
    "checkpoints": "checkpoints",
}
# Sections that a run of a stage does not read, whatever they say.
UNREAD = {
    "autoencoder": {"unet", "conditioning", "classifier", "diffusion", "sampling"},
    "diffusion": {"autoencoder_loss", "classifier"},
    "classifier": {"autoencoder_loss", "conditioning", "sampling"},
}
MOST_SHOWN = 6  # experiments named for one value; of more the rest is counted


@dataclasses.dataclass(frozen=True)
class Key:
    """One field of the configuration that holds a value, not a section."""

    name: str  # dotted, as in an override
    hint: Any
    default: Any
    description: str


def every_key() -> str:
    """All sections as Markdown, a heading for each section and each key."""
    values = _values_of_experiments()
    keys = all_keys()
    lines = ["## Of the run itself\n"]
    lines += [_entry(key, values) for key in keys if "." not in key.name]
    for place, section in _sections(Config):
        lines.append(f"## {place}\n\n{_about(section)}\n")
        lines += [_entry(key, values) for key in keys if key.name.rpartition(".")[0] == place]
    return "\n".join(lines)


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key that an override can set to a value, in the order of the schema."""
    return tuple(
        Key(f"{place}.{field.name}" if place else field.name, hint, _default(field), _descriptions(section)[field.name])
        for place, section in [("", Config), *_sections(Config)]
        for field, hint in zip(dataclasses.fields(section), field_types(section).values(), strict=True)
        if _section_of(hint) is None
    )


def _sections(section: type, place: str = "") -> Iterator[tuple[str, type]]:
    for name, hint in field_types(section).items():
        inner = _section_of(hint)
        if inner is not None:
            here = f"{place}.{name}" if place else name
            yield here, inner
            yield from _sections(inner, here)


def _section_of(hint: Any) -> type | None:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)), None)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@cache
def _descriptions(section: type) -> dict[str, str]:
    """Field -> the comment behind it and the lines of comment above it; "" where there is none."""
    source = inspect.getsource(section)
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first = node.lineno
        while comments.get(first - 1, ("", False))[1]:
            first -= 1
        last = node.end_lineno or node.lineno
        found[node.target.id] = " ".join(comments[line][0] for line in range(first, last + 1) if line in comments)
    return found


def _about(section: type) -> str:
    """The section's docstring, its paragraphs one after another."""
    return (inspect.getdoc(section) or "").replace("\n\n", "\n")


def _entry(key: Key, values: dict[str, dict[str, list[str]]]) -> str:
    facts = [f"**{_type(key.hint)}**", f"default `{_shown(key.default)}` {unit_of(key)}".rstrip()]
    if allowed := _allowed(key):
        facts.append(f"allowed: {allowed}")
    # The anchor is the key itself, so that a key can be linked without knowing how headings become anchors.
    attributes = f'#{key.name} data-toc-label="{key.name.rpartition(".")[2]}"'
    lines = [
        f"### `{key.name}` {{ {attributes} }}\n",
        f"{_sentence(key.description)}\n",
        " &middot; ".join(facts) + "\n",
    ]
    others = {value: names for value, names in values[key.name].items() if value != _shown(key.default)}
    if others:
        shown = "; ".join(f"<code>{html.escape(value)}</code> in {_named(names)}" for value, names in others.items())
        count = sum(map(len, others.values()))
        title = f"{count} {'experiment sets' if count == 1 else 'experiments set'} it differently"
        # As HTML, not Markdown in HTML, which takes seconds for all keys.
        lines.append(f'<details class="experiments"><summary>{title}</summary><p>{shown}</p></details>\n')
    return "\n".join(lines)


def _sentence(text: str) -> str:
    """As prose: asterisks and angle brackets of a comment are no markup."""
    text = text.replace("*", r"\*").replace("<", "&lt;").replace("|", r"\|")
    if text.partition(" ")[0].isalpha():
        text = text[:1].upper() + text[1:]
    return text + ("" if text.endswith(".") else ".")


def _named(experiments: list[str]) -> str:
    rest = len(experiments) - MOST_SHOWN
    return ", ".join(experiments[:MOST_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def unit_of(key: Key) -> str:
    """The unit of a number that its name says, "" where it has none."""
    if key.hint is bool or get_origin(key.hint) is Literal:
        return ""
    field = key.name.rpartition(".")[2]
    return UNITS.get(field.rpartition("_")[2], "")


def _type(hint: Any) -> str:
    """The type of a field in words."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(member for member in get_args(hint) if member is not type(None))
        return f"{_type(inner)} or null"
    if get_origin(hint) is Literal:
        return "choice"
    if get_origin(hint) is tuple:
        members = get_args(hint)
        if members[-1] is Ellipsis:
            return f"list of {_type(members[0])}s"
        return f"list of {len(members)} {_type(members[0])}s"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}[hint]


def _allowed(key: Key) -> str:
    hint = key.hint
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(member for member in get_args(hint) if member is not type(None))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    return bounds(key.name)


def _shown(value: Any) -> str:
    """A value as an override spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e-3 or value != int(value) else f"{value:.1f}"
    return str(value) if str(value) else '""'


def _values_of_experiments() -> dict[str, dict[str, list[str]]]:
    """Key -> value -> the experiments that have it, of the sections that are there and that their stage reads."""
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in list_experiments():
        config = experiment_config(name)
        for key in all_keys():
            section, _, field = key.name.rpartition(".")
            if not section or section.partition(".")[0] in UNREAD[config.stage]:
                continue
            owner = reduce(lambda inner, part: inner and getattr(inner, part), section.split("."), config)
            if owner is not None:
                values[key.name][_shown(getattr(owner, field))].append(name)
    return values


def experiment_config(name: str) -> Config:
    """The configuration of an experiment, without what only `load_config` fills in (its name and run folder)."""
    tree: dict[str, Any] = {}
    experiment = _read("experiment", name)
    groups = {
        group: choice
        for entry in _read("", "train")["defaults"]
        if isinstance(entry, dict)
        for group, choice in entry.items()
        if group != "experiment"
    }
    for entry in experiment.pop("defaults"):
        if isinstance(entry, dict):
            groups |= {group.removeprefix("override /"): choice for group, choice in entry.items()}
    for group, choice in groups.items():
        _merge(tree, {"unet" if group == "model" else group: _read(group, choice)})
    _merge(tree, experiment)
    return config_from_dict(tree)


@cache
def _text(group: str, name: str) -> str:
    return (CONFIG_DIR / group / f"{name}.yaml").read_text("utf-8")


def _read(group: str, name: str) -> dict[str, Any]:
    return yaml.safe_load(_text(group, name)) or {}


def _merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value
