"""Malformed records of every form, read as commands read them: used, dropped under a reason, or one message."""

import json
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings

from lit_alignment.errors import AlignmentError, RecordError
from tests.helpers.malformed import FORMS, cases, load, mutated

FEW = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY = settings(FEW, max_examples=100)
# What each file of a kind must end in an error for; hostile ones may be valid.
REFUSED = ("deep", "wrong encoding", "cut off")


def message_of(form: str, body: bytes, folder) -> str:
    """What is said of a file, or "" if it is used; anything but one of our errors is raised."""
    path = folder / "bad.jsonl"
    path.write_bytes(body)
    try:
        load(form, path, folder / "cache")
    except RecordError as error:
        assert str(path) in error.where, error
        assert len(str(error)) < 1500
        return str(error)
    except AlignmentError as error:
        assert str(path) in str(error), error
        return str(error)
    return ""


def check_cases(form: str, folder, every: int) -> None:
    """Read a part of the listed files of a form, another part of each form."""
    for kind, name, body in islice(cases(form), list(FORMS).index(form) % every, None, every):
        assert message_of(form, body, folder) or kind not in REFUSED, name


@pytest.mark.parametrize("form", FORMS)
def test_malformed_records_are_used_or_named(form, tmp_path):
    assert message_of(form, json.dumps(FORMS[form]).encode(), tmp_path) == ""
    check_cases(form, tmp_path, every=8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_every_malformed_record_is_used_or_named(form, tmp_path):
    assert len({kind for kind, _, _ in cases(form)}) == 6
    check_cases(form, tmp_path, every=1)


def check_mutated(form: str, folder, number) -> None:
    @number
    @given(mutated(form))
    def check(body):
        message_of(form, body, folder)

    check()


@pytest.mark.parametrize("form", FORMS)
def test_mutated_records_are_used_or_named(form, tmp_path):
    check_mutated(form, tmp_path, FEW)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_many_mutated_records_are_used_or_named(form, tmp_path):
    check_mutated(form, tmp_path, MANY)
