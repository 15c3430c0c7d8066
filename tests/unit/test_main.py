"""The dispatcher: commands, exit statuses, one-line errors, and an import that starts nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import ldm_scale
from ldm_scale import errors
from ldm_scale.__main__ import COMMANDS, help_text, main, run_command

PACKAGE = Path(ldm_scale.__file__).parent
SLOW_MODULES = {"torch", "deepspeed", "hydra", "numpy", "webdataset"}


def _defines_main(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)


def test_the_table_lists_exactly_the_commands_of_the_folder() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {
        "__init__",
        "__main__",
        "command_line",
        "errors",
        "faults",
        "processes",
        "redaction",
    }
    # A module whose command is a keyword of Python's ends with an underscore.
    assert set(COMMANDS) == {name.removesuffix("_") for name in files}
    assert [name for name in files if not _defines_main(PACKAGE / f"{name}.py")] == []


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    assert capsys.readouterr().out == f"{help_text()}\n" * 2
    assert all(f"  {name} " in help_text() for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ldm-scale {ldm_scale.__version__}\n"


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: ldm-scale has no command 'trian'; did you mean train?\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [(errors.ConfigError, 2), (errors.DataError, 3), (errors.CheckpointError, 4), (errors.NumericsError, 5)],
)
def test_a_users_mistake_is_one_line_and_its_status(
    error: type[errors.LdmScaleError], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(argv: Sequence[str]) -> int:
        raise error(f"{argv[0]}:\n  two lines")

    assert run_command(command, ["x"]) == status
    assert capsys.readouterr() == ("", "error: x: two lines\n")


def test_our_own_defects_keep_their_traceback() -> None:
    def command(argv: Sequence[str]) -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        run_command(command, [])


def test_interruption_has_the_shells_status(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: Sequence[str]) -> None:
        raise KeyboardInterrupt

    assert run_command(command, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_nothing_returned_is_success() -> None:
    assert run_command(lambda argv: None, []) == 0
    assert run_command(lambda argv: 7, []) == 7


def test_a_config_mistake_reaches_the_shell_as_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ldm_scale", "plan", "experiment=demo_txt"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: experiment=demo_txt: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m ldm_scale plan experiment=demo_text | true"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""


def _modules_after(code: str) -> set[str]:
    code += "\nimport sys; print('modules', *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_importing_the_package_and_asking_for_help_load_nothing_slow() -> None:
    assert not SLOW_MODULES & _modules_after("import ldm_scale; from ldm_scale.__main__ import main; main([])")


def test_import_is_fast() -> None:
    # The fastest of three: other work on the machine must not decide.
    assert min(_import_time_s() for _ in range(3)) < 0.3


def _import_time_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import ldm_scale"], timeout=60, check=True)
    return time.perf_counter() - started


def test_plan_does_not_import_deepspeed() -> None:
    # Importing DeepSpeed prints to stdout, where --json promises one object.
    modules = _modules_after("from ldm_scale.__main__ import main; main(['plan', 'experiment=demo_text', '--json'])")
    assert "torch" in modules
    assert "deepspeed" not in modules


def test_loaders_are_found_on_first_use() -> None:
    assert set(ldm_scale.__all__) == {"__version__", "load_autoencoder", "load_classifier", "load_diffusion"}
    with pytest.raises(AttributeError, match="no attribute 'load_nothing'"):
        _ = ldm_scale.load_nothing  # type: ignore[attr-defined]
    assert callable(ldm_scale.load_autoencoder)
    assert callable(ldm_scale.load_diffusion)
