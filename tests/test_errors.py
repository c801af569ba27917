from __future__ import annotations

import pytest

from flask_eventstream import errors


@pytest.mark.parametrize(
    ("error", "evidence", "text"),
    [
        (
            errors.InvalidFieldError("type", "a\n", "has a line break"),
            {"field": "type", "value": "a\n"},
            "type='a\\n' has a line break",
        ),
        (
            errors.TooLargeError("the size", 2000, 1000, "Send less."),
            {"field": "the size", "value": 2000, "limit": 1000},
            "the size is 2,000, and at most 1,000 is allowed. Send less.",
        ),
        (
            errors.ConfigurationError("KEY", 0, "must be more"),
            {"field": "KEY", "value": 0},
            "KEY=0 must be more",
        ),
        (
            errors.RightsError("what it returned", [], "return True"),
            {"field": "what it returned", "value": []},
            "what it returned is of the class list; return True",
        ),
        (errors.NotRegisteredError("shop"), {"value": "shop"}, "'shop' has no event stream"),
        (errors.BrokerClosedError(), {}, "the broker is closed"),
    ],
)
def test_an_error_says_what_happened_and_carries_the_evidence(
    error: errors.EventStreamError, evidence: dict[str, object], text: str
) -> None:
    assert text in str(error)
    assert {name: getattr(error, name) for name in evidence} == evidence
