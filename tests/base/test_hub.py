import io
import logging

import pytest

from patchloom.base.hub import fetching, reason


@pytest.fixture
def shown():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("huggingface_hub").addHandler(handler)
    yield stream
    logging.getLogger("huggingface_hub").removeHandler(handler)


def test_attempts_of_the_hub_are_one_line(shown, capsys):
    client = logging.getLogger("huggingface_hub.utils._http")
    with fetching():
        for attempt in range(1, 6):
            client.warning("'[Errno -2] Name or service not known' thrown while requesting HEAD https://…")
            client.warning(f"Retrying in {attempt}s [Retry {attempt}/5].")
        client.error("what is an error stays one")
    assert shown.getvalue() == "what is an error stays one\n"
    assert capsys.readouterr().err == "the Hugging Face hub does not answer; trying for a minute …\n"
    client.warning("outside, all is shown")
    assert shown.getvalue().endswith("outside, all is shown\n")


def test_the_reason_is_that_of_the_network_where_it_failed():
    ConnectError = type("ConnectError", (Exception,), {})  # httpx's, under whichever name it is imported
    error = OSError("a long story of caches and settings")
    error.__cause__ = ConnectError("[Errno -2] Name or service not known")
    assert reason(error) == "no connection: [Errno -2] Name or service not known"
    assert reason(ValueError("another\nfault")) == "ValueError: another fault"
