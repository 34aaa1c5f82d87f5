"""Prefix-aware routing: prompts that begin alike go to one replica, as long as it is not much busier than the rest."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.request_router import ReplicaID

from omni_ray.messages import HttpRequest
from omni_ray.replica.prefix import PrefixRouter, opening, request_router_config

DEPLOYMENT = DeploymentID("m", "omni")
REPLICAS: list[Any] = [SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT)) for name in "abcd"]
SYSTEM = {"role": "system", "content": "You draw."}


def request(*messages: Any, **body: Any) -> HttpRequest:
    content = json.dumps({"messages": list(messages), **body} if messages else body).encode()
    return HttpRequest(method="POST", path="/v1/chat/completions", headers=(), body=content)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def router() -> Any:
    made = object.__new__(PrefixRouter)
    made.initialize_state()
    loads: dict[str, int] = {}
    made._replica_queue_len_cache = SimpleNamespace(get=lambda replica_id: loads.get(replica_id.unique_id))
    made.loads = loads
    return made


async def ranked(router: Any, each: HttpRequest) -> list[str]:
    pending: Any = SimpleNamespace(args=[each], routing_context=SimpleNamespace(should_backoff=False))
    ranks = await router.choose_replicas(REPLICAS, pending)
    return ["".join(replica.replica_id.unique_id for replica in rank) for rank in ranks]


def test_the_opening_ends_with_the_first_user_message() -> None:
    later = [{"role": "assistant", "content": "Yes."}, user("And then?")]
    assert opening(request(SYSTEM, user("A"))) == opening(request(SYSTEM, user("A"), *later))
    assert opening(request(SYSTEM, user("A"))) != opening(request(SYSTEM, user("B")))
    assert opening(request(prompt="a cat")) == opening(request(prompt="a cat", max_tokens=3))


@pytest.mark.parametrize("body", [b"", b"[1]", b'{"model": "m"}', b'{"prompt": ""}'])
def test_a_body_without_a_prompt_has_no_opening(body: bytes) -> None:
    assert opening(HttpRequest(method="POST", path="/", headers=(), body=body)) is None


async def test_a_conversation_stays_where_it_began(router: Any) -> None:
    first = await ranked(router, request(user("A")))
    assert await ranked(router, request(user("A"), {"role": "assistant", "content": "x"}, user("more"))) == first
    favourites = {(await ranked(router, request(user(f"prompt {i}"))))[0] for i in range(40)}
    assert favourites == set("abcd")


async def test_a_replica_that_is_much_busier_is_passed_over(router: Any) -> None:
    favourite, second, *_ = await ranked(router, request(user("A")))
    router.loads[favourite] = 7
    assert (await ranked(router, request(user("A"))))[0] == favourite
    router.loads[favourite] = 9
    assert (await ranked(router, request(user("A"))))[0] == second


def test_the_yaml_chooses() -> None:
    assert request_router_config("prefix").request_router_class.endswith(":PrefixRouter")
    assert (
        request_router_config("balanced").request_router_class != request_router_config("prefix").request_router_class
    )
