"""Some hundred bodies of the campaign in fuzz.py: no 500, no internals in errors."""

from __future__ import annotations

import asyncio

import pytest

from tests.serve.client import Answer
from tests.serve.fuzz import campaign, complaint


@pytest.mark.slow
def test_no_body_makes_the_server_fail() -> None:
    statuses, complaints = asyncio.run(campaign(400, seed=0))
    assert not complaints, "\n".join(complaints)
    assert sum(statuses.values()) == 400
    assert statuses[200] > 40
    assert statuses[400] > 100


def test_the_campaign_would_complain() -> None:
    good = b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}'
    assert complaint(Answer(400, {}, good)) is None
    assert complaint(Answer(500, {}, good)) == "status 500"
    assert complaint(Answer(400, {}, b'{"error": {"message": "m"}}')) == "not OpenAI's format"
    leak = good.replace(b'"m"', b'"no /x/site-packages/y"')
    assert complaint(Answer(400, {}, leak)) == "it contains ['site-packages']"
