"""Every --help shows an example, and every example is a command line that its command takes."""

from __future__ import annotations

import argparse
import contextlib
import keyword
import shlex
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest

from ldm_scale.__main__ import COMMANDS, main
from ldm_scale.command_line import EXAMPLES
from ldm_scale.config.compose import load_config
from ldm_scale.doctor import SUBJECTS


class _Parsed(Exception):
    """A command line was taken, by this parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end with `_Parsed` where their arguments are in order, and with SystemExit where they are not."""
    parse = argparse.ArgumentParser.parse_known_args

    def instead(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, rest = parse(self, args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {rest}")
        if self.prog != "ldm-scale doctor":  # which looks for its subject first
            raise _Parsed(self)
        return parsed

    def first(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return instead(self, args, namespace)

    def mixed(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        # argparse's own intermixed parsing calls parse_known_args several times.
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        _, rest = self.parse_known_intermixed_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {rest}")
        raise _Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", first)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", mixed)


def _actions(parser: argparse.ArgumentParser) -> list[str]:
    """Names of the sub-commands that a parser has."""
    return [
        name for action in parser._actions if isinstance(action, argparse._SubParsersAction) for name in action.choices
    ]


def _with_actions() -> list[tuple[str, ...]]:
    """Every command, and every command with each of its sub-commands."""
    from ldm_scale import evaluate
    from ldm_scale.operations.prepare_arguments import build_parser

    actions = {"prepare": _actions(build_parser()), "evaluate": _actions(evaluate._parser()), "doctor": list(SUBJECTS)}
    alone: list[tuple[str, ...]] = [(), *((name,) for name in COMMANDS)]
    return alone + [(name, action) for name, parts in actions.items() for action in parts]


def _main_of(name: str) -> Callable[[list[str]], object]:
    """What runs a command."""
    module = f"{name}_" if keyword.iskeyword(name) else name
    return import_module(f"ldm_scale.{module}").main  # type: ignore[no-any-return]


ALL = _with_actions()


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_ends_with_an_example(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # argparse's way
        assert main([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    prog = " ".join(("ldm-scale", *words))
    examples = [line.removeprefix("example: ") for line in lines if line.startswith("example: ")]
    assert tuple(examples) == EXAMPLES[prog]
    assert examples
    assert all(example.startswith(f"{prog} ") for example in examples)


def test_no_command_has_sub_commands_that_the_walk_does_not_see(only_parse: None) -> None:
    seen = {words[0] for words in ALL if len(words) == 2}
    for name in set(COMMANDS) - {"train"} - seen:
        example = EXAMPLES[f"ldm-scale {name}"][0]
        with pytest.raises(_Parsed) as parsed:
            _main_of(name)(shlex.split(example)[2:])
        assert _actions(parsed.value.parser) == [], name


def test_every_example_belongs_to_a_command() -> None:
    assert set(EXAMPLES) == {" ".join(("ldm-scale", *words)) for words in ALL}


@pytest.mark.parametrize("example", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_taken(example: str, only_parse: None) -> None:
    program, name, *arguments = shlex.split(example)
    assert program == "ldm-scale"
    if name == "train":
        assert load_config(arguments).experiment == "openmoji_text"
        return
    with pytest.raises(_Parsed):
        _main_of(name)(arguments)
    with pytest.raises(SystemExit) as refused:
        _main_of(name)([*arguments, "--no-such-option"])
    assert refused.value.code == 2
