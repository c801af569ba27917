from __future__ import annotations

from flask_eventstream import endings


def test_every_reason_has_a_word_of_its_own_and_some_are_worth_a_line_in_the_log() -> None:
    texts = {name: value for name, value in vars(endings).items() if isinstance(value, str)}
    words = [value for name, value in texts.items() if name.isupper()]
    assert sorted(set(endings.REASONS)) == sorted(words)
    assert set(endings.ABNORMAL) < set(endings.REASONS)
