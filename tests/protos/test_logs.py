from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys, threading, warnings
from tokenloom.wire.logs import set_up_logs

set_up_logs("front", form={form!r}, level={level!r}, tells_errors={tells_errors})
log = logging.getLogger("test")
log.debug("quiet")
log.info("two\\nlines", extra={{"fields": {{"code": "OK", "total_s": 0.12345678, "price": None}}}})

def fail():
    try:
        {{}}["the secret"]
    except KeyError as error:
        raise ValueError("the secret again") from error

try:
    fail()
except ValueError:
    log.exception("fault %s", "f1")
warnings.warn("old")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""


def logged(*, form: str, level: str = "info", tells_errors: bool = True) -> str:
    script = SCRIPT.format(form=form, level=level, tells_errors=tells_errors)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_json_is_an_object_a_line_whatever_is_logged() -> None:
    records = [json.loads(line) for line in logged(form="json").splitlines()]
    assert [record["message"].split()[0] for record in records[:2]] == ["two", "fault"]
    assert {record["process"] for record in records} == {"front"}
    assert len({record["pid"] for record in records}) == 1
    first, fault, warned, thread, last = records
    assert first.items() >= {"message": "two\nlines", "code": "OK", "total_s": 0.123457}.items()
    assert first["level"] == "info"
    assert first["time"].endswith("Z")
    assert "price" not in first
    assert "KeyError: 'the secret'" in fault["error"]
    assert "old" in warned["message"]
    assert (thread["level"], last["level"]) == ("error", "critical")
    assert "ValueError: the secret again" in last["error"]


def test_text_is_a_line_with_its_fields_behind_the_message() -> None:
    log = logged(form="text")
    assert " INFO two\nlines code=OK total_s=0.123457\n" in log
    assert "front[" in log
    assert "KeyError: 'the secret'" in log


@pytest.mark.parametrize("form", ["text", "json"])
def test_where_callers_words_may_be_quoted_an_error_is_told_by_type_and_place(form: str) -> None:
    log = logged(form=form, tells_errors=False)
    assert "again" not in log
    assert "KeyError" in log
    assert "ValueError" in log
    assert "in fail" in log


def test_below_its_level_nothing_is_logged() -> None:
    assert "quiet" in logged(form="text", level="debug")
    assert "two" not in logged(form="text", level="error")
