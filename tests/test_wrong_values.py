"""Values that the annotation of a field does not allow are refused, with the name of the field."""

import json
import subprocess
import sys

import pytest
from stopping import ENVIRONMENT

# The fields are tried in another process: here, the tests check types first.
SCRIPT = """
import dataclasses, inspect, json, math, typing
import jchain as jc
from beartype.door import is_bearable
WRONG = [None, "x", b"x", -1, -0.5, 2.5, math.nan, math.inf, True, [], (), {}, [1], object, len, jc]
found = []
names = [name for name in dir(jc) if inspect.isclass(getattr(jc, name))]
classes = [getattr(jc, name) for name in names]
classes += [value for value in vars(jc.updates).values() if inspect.isclass(value)]
classes = [
    cls for cls in dict.fromkeys(classes)
    if dataclasses.is_dataclass(cls)
    and cls.__module__.startswith(("jchain.search", "jchain.updates"))
    and all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(cls)
    )
]
for cls in classes:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for value in WRONG:
            try:
                cls(**{field.name: value})
            except ValueError as error:
                is_named = field.name in str(error) and "expected" in str(error)
                outcome = "refused" if is_named else f"unnamed: {error}"
            except Exception as error:
                outcome = f"raw: {type(error).__name__}: {error}"
            else:
                outcome = "accepted"
            is_allowed = bool(is_bearable(value, hints[field.name]))
            is_allowed |= hints[field.name] is float and type(value) is int
            found.append([cls.__name__, field.name, repr(value)[:30], outcome, is_allowed])
print(json.dumps(found))
"""
# Values of a right type that are out of range are the concern of `test_wrong_calls`.
ANY = ("params", "critic")


@pytest.fixture(scope="module")
def outcomes():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_searches_and_policies_are_tried(outcomes):
    tried = {row[0] for row in outcomes}
    assert {"ActorCritic", "BeamSearch", "CriticSearch", "MCTS", "CloneThenTune"} <= tried
    assert len(tried) >= 13
    assert len(outcomes) > 600


def test_no_error_is_raw_or_without_a_name(outcomes):
    bad = [row for row in outcomes if row[3] not in ("accepted", "refused") and row[1] not in ANY]
    assert not bad


def test_what_an_annotation_does_not_allow_is_refused(outcomes):
    bad = [row for row in outcomes if row[3] == "accepted" and not row[4] and row[1] not in ANY]
    assert not bad


def test_numbers_are_never_nan(outcomes):
    found = [row for row in outcomes if row[2] == "nan" and row[3] == "accepted"]
    assert not [row for row in found if row[1] not in ANY]
