from __future__ import annotations

import pytest

from flask_eventstream.local_broker import seq_of_minted


@pytest.mark.parametrize("id", ["ab-1", "ab-0", "ab-0042", "ab-9999999999999999999"])
def test_an_id_of_the_epoch_has_a_number(id: str) -> None:
    assert seq_of_minted(id, "ab") == int(id[3:])


@pytest.mark.parametrize(
    "id", ["", "ab", "ab-", "abc-1", "-1", "ab--1", "ab-x", "ab-٣", "ab-" + "9" * 20]
)
def test_every_other_id_has_none(id: str) -> None:
    assert seq_of_minted(id, "ab") is None
