"""Which rank says what, where, and how often."""

import logging
from collections.abc import Iterator

import pytest

from ldm_scale.telemetry import log


@pytest.fixture(autouse=True)
def fresh_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_NAME", "ldm_scale_under_test")
    monkeypatch.setattr(log, "_said", set())
    yield
    logging.getLogger("ldm_scale_under_test").handlers.clear()


def test_rank_0_informs_on_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    log.get_logger(0).info("training on %d ranks", 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(" training on 2 ranks\n")
    assert err.count("\n") == 1


def test_other_ranks_say_only_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    logger = log.get_logger(3)
    logger.info("all is well")
    logger.warning("slow disk")
    assert capsys.readouterr().err.endswith(" [rank 3] slow disk\n")


def test_asking_again_neither_doubles_lines_nor_forgets_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    log.get_logger(1)
    log.get_logger(1)
    logger = log.get_logger()
    logger.info("not from here")
    logger.error("broken")
    assert capsys.readouterr().err.count("broken") == 1
    assert logger.level == logging.WARNING


def test_the_root_logger_does_not_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handler = logging.StreamHandler()
    root.addHandler(handler)
    try:
        log.get_logger(0).warning("only once")
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().err.count("only once") == 1


def test_progress_belongs_to_rank_0() -> None:
    log.get_logger(1)
    assert not log.shows_progress()
    log.get_logger(0)
    assert log.shows_progress()


def test_say_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        log.say_once("device", "no CUDA device: training on the CPU")
        log.say_once("kernels", "plain torch operators")
    err = capsys.readouterr().err
    assert err.count("no CUDA device") == 1
    assert err.count("plain torch operators") == 1
