"""Command lines in the documentation are ones that the programs take: options, keys, targets, scripts, modules."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ldm_scale.__main__ import COMMANDS, main
from ldm_scale.command_line import Parser
from ldm_scale.config.compose import load_config
from ldm_scale.config.convert import key_type
from ldm_scale.config.schema import Config
from ldm_scale.config.validate import validate, validate_architecture
from tests.helpers.documents import ROOT, blocks, code_spans, command_lines, pages

SHELL = ("", "bash", "sh", "console")
SECTIONS = {field.name for field in dataclasses.fields(Config)}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_0-9.]*")
TARGETS = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
TARGETS |= {
    name
    for line in re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    for name in line.split()
}


class _ParsedError(Exception):
    """What a command line was read as; raised instead of doing it."""

    def __init__(self, namespace: Any) -> None:
        super().__init__()
        self.namespace = namespace


def _lines() -> Iterator[tuple[str, str]]:
    """Place and text of every command line: in code blocks, and in the text those that are whole."""
    for path in pages():
        for line, text in code_spans(path):
            if text.startswith(("ldm-scale ", ".venv/bin/ldm-scale ")) and _is_whole(text):
                yield f"{path.relative_to(ROOT)}:{line}", text
        for block in blocks(path):
            if block.language in SHELL:
                for line, command in command_lines(block):
                    yield f"{block.page}:{line}", command


def _is_whole(text: str) -> bool:
    """Whether a command in a sentence names real files or keys, and no placeholder."""
    words = text.split()
    return any("/" in word or "=" in word for word in words) and not any(
        PLACEHOLDER.search(word) or word[0] == "[" for word in words
    )


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a line, without variables before it; nothing where it is no command line."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # prose or code with an apostrophe
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word in (";", "&&", "|") or word.endswith(";"):
            command.append(word.rstrip(";"))
            while command and re.fullmatch(r"[A-Z_]+=\S*", command[0]):
                command.pop(0)
            yield [part for part in command if part]
            command = []
        else:
            command.append(word)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Reads a command line as `ldm-scale` would, as far as its files; fails where it would be refused."""
    plain, intermixed = Parser.parse_args, Parser.parse_intermixed_args

    def parse_args(self: Parser, *arguments: Any) -> Any:
        namespace = plain(self, *arguments)
        if self.prog == "ldm-scale doctor":  # only looks for its sub-command
            return namespace
        raise _ParsedError(namespace)

    def parse_intermixed(self: Parser, *arguments: Any) -> NoReturn:
        raise _ParsedError(intermixed(self, *arguments))

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    monkeypatch.setattr(Parser, "parse_intermixed_args", parse_intermixed)

    def read(words: list[str]) -> None:
        if words[:1] == ["train"]:
            if words[1:] not in (["--help"], ["-h"]):
                _composes(tuple(words[1:]))
            return
        try:
            main(words)
        except _ParsedError as parsed:
            given = [*getattr(parsed.namespace, "overrides", []), *_source(parsed.namespace)]
            if given:
                _composes(tuple(given))

    return read


def _source(namespace: Any) -> list[str]:
    """The overrides of `ldm-scale export experiment=NAME`."""
    source = getattr(namespace, "source", [])
    return source if isinstance(source, list) and "experiment=" in " ".join(map(str, source)) else []


@cache
def _composes(overrides: tuple[str, ...]) -> None:
    """Nothing, if a run could begin with these overrides; of names in capitals the keys alone are looked at."""
    for override in overrides:
        assert key_type(override.partition("=")[0]) is not None or override.partition("=")[0] == "model", override
    config = load_config([override for override in overrides if not _is_placeholder(override.partition("=")[2])])
    if not any(override.startswith("experiment=") for override in overrides):
        return
    if config.data.manifest and (config.stage == "autoencoder" or config.artifact):
        validate(config, world_size=1)
    else:
        validate_architecture(config)


def _is_placeholder(value: str) -> bool:
    return PLACEHOLDER.fullmatch(value) is not None


def _check(words: list[str], read: Callable[[list[str]], None]) -> bool:
    """Whether these words call something of this project; fails where it does not exist or would refuse them."""
    words = [word for word in words if word != "..."]
    if not words:
        return False
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "ldm-scale":
        read(rest)
    elif program == "make":
        missing = {word for word in rest if "=" not in word} - TARGETS
        assert not missing, f"the Makefile has no target {missing}"
    elif program in ("torchrun", "deepspeed", "python", "srun"):
        return _check_python(rest, read)
    elif program == "sbatch" or program.startswith("slurm/"):
        script = next((word for word in words if word.startswith("slurm/") and word.endswith(".sh")), None)
        assert script is not None, words
        assert (ROOT / script).is_file(), f"there is no {script}"
        arguments = words[words.index(script) + 1 :]
        command = "encode" if script.startswith("slurm/encode") else "train"
        if arguments:
            read([command, *arguments])
    else:
        return False
    return True


def _check_python(words: list[str], read: Callable[[list[str]], None]) -> bool:
    """As `_check`, of what Python or a launcher is given: a script or -m and a module."""
    for index, word in enumerate(words):
        rest = words[index + 1 :]
        if word == "-m" and rest:
            return _check_module(rest[0], rest[1:], read)
        if word.startswith(("ldm_scale/", "benchmarks/")):
            assert (ROOT / word).is_file(), f"there is no {word}"
            return _check_module(word.removesuffix(".py").replace("/", "."), rest, read)
    return False


def _check_module(module: str, rest: list[str], read: Callable[[list[str]], None]) -> bool:
    package, _, name = module.partition(".")
    if package == "ldm_scale":
        read([name, *rest] if name else rest)
        return True
    base = {"benchmarks": ROOT, "ldm_kernels": ROOT / "kernels"}.get(package)
    if base is None:
        return False
    path = base / module.replace(".", "/")
    sources = [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.glob("*.py"))
    assert sources, f"there is no {module}"
    # Options are made by the module or by what benchmarks have in common, some from lists of names.
    text = "".join(source.read_text("utf-8") for source in [*sources, ROOT / "benchmarks" / "measured.py"])
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert re.search(f'"(--)?{option[2:]}"', text), f"{module} has no {option}"
    overrides = [word for word in rest if key_type(word.partition("=")[0]) is not None and "=" in word]
    if overrides:
        _composes(tuple(overrides))
    return True


LINES = list(_lines())


@pytest.mark.parametrize("page", sorted({place.partition(":")[0] for place, _ in LINES}))
def test_every_command_line_of_a_page_is_taken(page: str, reads: Callable[[list[str]], None]) -> None:
    wrong = []
    for place, text in LINES:
        if place.partition(":")[0] != page:
            continue
        for words in _commands(text):
            try:
                _check(words, reads)
            except (Exception, SystemExit) as error:
                wrong.append(f"{place}: {shlex.join(words)}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_lines_are_found() -> None:
    taken = [place for place, text in LINES for words in _commands(text) if _is_ours(words)]
    assert len(taken) > 90
    assert {"README.md", "docs/quickstart.md", "docs/cluster.md", "docs/sampling.md", "docs/data.md"} <= {
        place.partition(":")[0] for place in taken
    }


def _is_ours(words: list[str]) -> bool:
    return bool(words) and words[0].removeprefix(".venv/bin/") in ("ldm-scale", "make", "deepspeed", "torchrun")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ldm-scale sample runs/ldm --promt cat", "SystemExit"),
        ("ldm-scale train experiment=sd3", "ConfigError"),
        ("ldm-scale plan experiment=sd2 trian.seed=1", "AssertionError"),
        ("ldm-scale train experiment=openmoji_text train.global_batch=7.5", "ConfigError"),
        ("ldm-scale doctor order data/m.json --seed 1", "SystemExit"),
        ("make everything", "AssertionError"),
        ("sbatch slurm/train_all.sh", "AssertionError"),
        ("torchrun --nproc-per-node 2 ldm_scale/trane.py experiment=sd2", "AssertionError"),
        ("python -m benchmarks.unet_step --cases demo", "AssertionError"),
        ("cd x && OMP_NUM_THREADS=1 .venv/bin/ldm-scale prepare index --out", "SystemExit"),
    ],
)
def test_a_wrong_line_is_found(line: str, message: str, reads: Callable[[list[str]], None]) -> None:
    found = []
    for words in _commands(line):
        try:
            _check(words, reads)
        except (Exception, SystemExit) as error:
            found.append(type(error).__name__)
    assert found == [message]


def test_commands_in_the_text_have_their_options() -> None:
    """In sentences command lines are cut short, so options and keys are looked at one by one."""
    wrong = []
    for path in pages():
        if path.name == "decisions.md":  # a log, which also names what there once was
            continue
        for line, text in code_spans(path):
            wrong += [f"{path.relative_to(ROOT)}:{line}: `{text}`: {fault}" for fault in _faults_of_span(text)]
    assert not wrong, "\n".join(wrong)


def _faults_of_span(text: str) -> Iterator[str]:
    words = text.split()
    if words[0] == "make" and len(words) > 1:
        yield from (f"no target {word}" for word in words[1:] if re.fullmatch(r"[a-z-]+", word) and word not in TARGETS)
    key = re.fullmatch(r"([a-z0-9_]+)(\.[a-z0-9_]+)+(?==|$)", words[0].partition("=")[0])
    if (
        key
        and key[1] in SECTIONS
        and key_type(key[0]) is None
        and not key[0].endswith((".py", ".md", ".json", ".yaml"))
    ):
        yield "no such key"
    if words[0].removeprefix(".venv/bin/") != "ldm-scale" or len(words) < 2 or not words[1].isalpha():
        return
    if not words[1].isupper() and words[1] not in COMMANDS:
        yield f"no command {words[1]}"
        return
    options = _options(words[1])
    yield from (f"no option {word}" for word in words[2:] if word.startswith("--") and word.strip("[],") not in options)


@cache
def _options(command: str) -> set[str]:
    """Every option that a command or one of its sub-commands has, by its sources."""
    sources = [
        *(ROOT / "ldm_scale").glob(f"{command}*.py"),
        *(ROOT / "ldm_scale" / "operations").glob(f"{command}*.py"),
    ]
    texts = [source.read_text("utf-8") for source in sources]
    return {option for text in texts for option in re.findall(r'"(--[a-z-]+)"', text)} | {"--help"}


def test_scripts_named_in_the_text_exist() -> None:
    wrong = []
    for path in pages():
        for line, text in code_spans(path):
            if re.fullmatch(r"(ldm_scale|benchmarks|kernels|configs|slurm|tests|docs)/[\w./-]+\.(py|sh|yaml|md)", text):
                exists = (ROOT / text).is_file() or "NAME" in text
                wrong += [] if exists else [f"{path.relative_to(ROOT)}:{line}: {text}"]
    assert not wrong, "\n".join(wrong)


def test_pages_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in pages()}
    assert {"README.md", "docs/results/soak.md", "kernels/ldm_kernels/geglu/README.md"} <= names
    assert Path("docs/quickstart.md").as_posix() in names
