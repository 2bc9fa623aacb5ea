"""What a client sees where nothing is tried again, and what becomes of a lost replica, gateway or node."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from waiting import wait_until

from asking import opened, post
from small import TINY, kill, replicas_of, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
START_S = 240
LONG: dict[str, Any] = {"max_tokens": 1500, "detox": {"guard": False}}


@pytest.fixture(scope="module")
def url(cluster: str, folder: str) -> Iterator[str]:
    with serving(models={"tiny": {**TINY, "model": folder}}, ray={"retries": 0}) as at:
        yield at


def test_an_untried_stream_ends_with_a_named_error_and_an_answer_with_503(url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(post, url, **LONG)
        wait_until(lambda: "requests_under_way 1.0" in httpx.get(f"{url}/metrics", trust_env=False).text)
        with opened(url, **LONG) as (status, events):
            assert status == 200
            assert next(events)["choices"][0]["delta"]["role"] == "assistant"
            assert next(events)["choices"][0]["delta"]["content"]
            (before,) = replicas_of("engine-tiny")
            kill([before])
            *_, error, done = events
    assert error["error"]["code"] == "unavailable"
    assert error["error"]["type"] == "server_error"
    assert done == "[DONE]"
    answer = whole.result()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert answer.headers["retry-after"]
    wait_until(lambda: replicas_of("engine-tiny") not in ([], [before]), START_S)
    wait_until(lambda: post(url).status_code == 200, START_S)


def test_a_lost_gateway_breaks_its_stream_where_the_client_sees_it(url: str) -> None:
    with opened(url, **LONG) as (status, events):
        assert status == 200
        assert next(events)["choices"][0]["delta"]["role"] == "assistant"
        (before,) = replicas_of("gateway")
        kill([before])
        with pytest.raises(httpx.TransportError):
            list(events)
    wait_until(lambda: post(url).status_code == 200, START_S)
