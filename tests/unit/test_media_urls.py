"""Media by URL: fetched from the hosts that the YAML allows and from no other address, whoever points there.

Real servers on two loopback addresses count what reaches them; of the network, the resolver alone is replaced.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from omni_ray.api import media
from omni_ray.api.media import Fetcher, is_public
from omni_ray.config.spec import Api
from omni_ray.errors import RequestError

PNG = b"\x89PNG the bytes of an image"
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.hits.append((self.path, self.headers["Host"]))
        name, _, argument = self.path.lstrip("/").partition("?")
        if name == "to":
            self._answer(302, b"", location=argument)
        elif name == "hops":
            left = int(argument)
            self._answer(302, b"", location=f"/hops?{left - 1}" if left > 1 else "/a.png")
        elif name == "page":
            self._answer(200, b"<html>", kind="text/html")
        elif name == "slow":
            time.sleep(0.5)
            self._answer(200, PNG)
        elif name == "endless":
            self._answer(200, b"x" * 2**21, length=False)
        else:
            self._answer(200 if name.endswith("png") else 404, PNG)

    def _answer(
        self, status: int, body: bytes, kind: str = "image/png", location: str = "", length: bool = True
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if location:
            self.send_header("Location", location)
        if length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has enough
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    hits: list[tuple[str, str]]


def serve(address: str, port: int) -> Server:
    server = Server((address, port), Handler)
    server.hits = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`allowed.test` is at 127.0.0.1, where a server may be fetched from; `inside.test` is at 127.0.0.2, where another
    one must never be reached. ``addresses`` are those of every name, ``lookups`` the names that were looked up."""
    allowed = serve("127.0.0.1", 0)
    inside = serve("127.0.0.2", allowed.server_port)
    addresses = {"allowed.test": ["127.0.0.1"], "www.wide.test": ["127.0.0.1"], "inside.test": ["127.0.0.2"]}
    lookups: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        lookups.append(name)
        if name.endswith(".test") and name not in addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        numbers = addresses.get(name, [name])
        return [found for number in numbers for found in real(number, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    port = allowed.server_port
    yield SimpleNamespace(allowed=allowed, inside=inside, addresses=addresses, lookups=lookups, port=port)
    for server in (allowed, inside):
        server.shutdown()
        server.server_close()


def fetcher(net: Any, *hosts: str, networks: tuple[str, ...] = ("127.0.0.1/32",), **keys: Any) -> Fetcher:
    hosts = tuple(f"{host}:{net.port}" for host in hosts or ("allowed.test", "inside.test", "*.wide.test"))
    return Fetcher(Api(media_hosts=list(hosts), media_networks=list(networks), **keys))


def body(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": "d", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}


async def fetched(fetcher: Fetcher, url: str) -> str:
    asked = body(url)
    assert await fetcher.inline(asked)
    return str(asked["messages"][0]["content"][1]["image_url"]["url"])


async def refused(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(RequestError) as caught:
        await fetcher.inline(body(url))
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_image_url", "messages.0.content.1.image_url.url")
    return error.message


async def test_an_allowed_host_is_fetched_from_the_address_that_was_checked(net: Any) -> None:
    assert await fetched(fetcher(net), f"http://allowed.test:{net.port}/a.png") == DATA_URL
    assert net.allowed.hits == [("/a.png", f"allowed.test:{net.port}")]
    assert net.lookups.count("allowed.test") == 1


async def test_a_wildcard_is_of_what_lies_below(net: Any) -> None:
    assert await fetched(fetcher(net), f"HTTP://WWW.wide.test:{net.port}/a.png") == DATA_URL
    for host in ("wide.test", "www.wide.test.evil.test", "evilwide.test"):
        assert "none that api.media_hosts allows" in await refused(fetcher(net), f"http://{host}:{net.port}/a.png")


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test:{port}/a.png",
        "http://allowed.test/a.png",
        "https://allowed.test:1/a.png",
        "http://127.0.0.1:{port}/a.png",
        "http://2130706433:{port}/a.png",
        "http://[::1]:{port}/a.png",
        "http://[::ffff:127.0.0.1]:{port}/a.png",
        "http://allowed.test:{port}@inside.test/a.png",
        "http://user@allowed.test:{port}/a.png",
        "http://inside.test\\@allowed.test:{port}/a.png",
        " http://inside.test/a.png",
        "http:///a.png",
        "http://a b/",
    ],
)
async def test_other_hosts_are_not_even_looked_up(url: str, net: Any) -> None:
    await refused(fetcher(net, "allowed.test"), url.format(port=net.port))
    assert not net.lookups
    assert not net.allowed.hits
    assert not net.inside.hits


async def test_nothing_is_fetched_by_default(net: Any) -> None:
    for url in (f"http://allowed.test:{net.port}/a.png", f"http://127.0.0.1:{net.port}/a.png"):
        assert "api.media_hosts allows" in await refused(Fetcher(Api()), url)
    assert not net.lookups
    assert not net.allowed.hits


@pytest.mark.parametrize(
    "address", ["127.0.0.2", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.2", "64:ff9b::7f00:2", "0.0.0.0"]
)
async def test_a_name_that_resolves_to_a_forbidden_address(address: str, net: Any) -> None:
    net.addresses["inside.test"] = [address]
    message = await refused(fetcher(net), f"http://inside.test:{net.port}/a.png")
    assert "not in the public internet" in message
    assert address not in message
    assert not net.inside.hits


async def test_one_forbidden_address_of_several_is_enough(net: Any) -> None:
    net.addresses["allowed.test"] = ["127.0.0.1", "127.0.0.2"]
    await refused(fetcher(net), f"http://allowed.test:{net.port}/a.png")
    assert not net.allowed.hits


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("http://inside.test:{port}/a.png", "not in the public internet"),
        ("//inside.test:{port}/a.png", "not in the public internet"),
        ("http://127.0.0.2:{port}/a.png", "none that api.media_hosts allows"),
        ("http://nowhere.test:{port}/a.png", "none that api.media_hosts allows"),
        ("file:///etc/hostname", "not plain http"),
        ("ftp://allowed.test/a.png", "not plain http"),
        ("http://user@allowed.test:{port}/a.png", "not plain http"),
    ],
)
async def test_a_redirect_to_a_forbidden_place(target: str, words: str, net: Any) -> None:
    url = f"http://allowed.test:{net.port}/to?{target.format(port=net.port)}"
    assert words in await refused(fetcher(net), url)
    assert len(net.allowed.hits) == 1
    assert not net.inside.hits


async def test_three_redirects_are_followed_and_no_more(net: Any) -> None:
    assert await fetched(fetcher(net), f"http://allowed.test:{net.port}/hops?3") == DATA_URL
    assert "more than 3 redirects" in await refused(fetcher(net), f"http://allowed.test:{net.port}/hops?4")
    assert len(net.allowed.hits) == 4 + 4


async def test_a_name_that_changes_between_two_hops_is_checked_again(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fetcher(net)
    look = asked._addresses

    async def rebinding(url: Any, slot: Any) -> Any:
        found = await look(url, slot)
        net.addresses["allowed.test"] = ["127.0.0.2"]  # for whoever looks the name up after the check
        return found

    monkeypatch.setattr(asked, "_addresses", rebinding)
    assert await fetched(asked, f"http://allowed.test:{net.port}/a.png") == DATA_URL
    net.addresses["allowed.test"] = ["127.0.0.1"]
    await refused(asked, f"http://allowed.test:{net.port}/to?/a.png")
    assert not net.inside.hits


@pytest.mark.parametrize(
    ("path", "keys", "words"),
    [
        ("page", {}, "is no image: its content-type is 'text/html'"),
        ("nothing", {}, "its host answers 404"),
        ("a.png", {"media_max_mib": 1e-5}, "is too large"),
        ("endless", {"media_max_mib": 1}, "is too large"),
        ("slow", {"media_timeout_s": 0.1}, r"within the 0.1 s of api.media_timeout_s"),
    ],
)
async def test_what_is_no_image_or_too_much(path: str, keys: dict[str, Any], words: str, net: Any) -> None:
    assert words in await refused(fetcher(net, **keys), f"http://allowed.test:{net.port}/{path}")


async def test_the_size_is_that_of_all_together(net: Any) -> None:
    part = body(f"http://allowed.test:{net.port}/a.png")["messages"][0]["content"][1]
    asked = {"messages": [{"content": [part, {**part, "image_url": {**part["image_url"]}}]}]}
    with pytest.raises(RequestError, match="is too large"):
        await fetcher(net, media_max_mib=1.5 * len(PNG) / 2**20).inline(asked)
    many = {"messages": [{"content": [{"image_url": f"http://allowed.test:{net.port}/a.png"} for _ in range(33)]}]}
    with pytest.raises(RequestError, match="at most 32 URLs"):
        await fetcher(net).inline(many)


async def test_hosts_that_do_not_answer(net: Any) -> None:
    net.addresses["allowed.test"] = ["127.0.0.1"]
    net.allowed.shutdown()
    net.allowed.server_close()
    assert "does not answer" in await refused(fetcher(net), f"http://allowed.test:{net.port}/a.png")
    del net.addresses["allowed.test"]
    assert "has no address" in await refused(fetcher(net), f"http://allowed.test:{net.port}/a.png")


async def test_every_place_of_a_body_that_holds_media(net: Any) -> None:
    url = f"http://allowed.test:{net.port}/a.png"
    places = {
        "messages": [
            {"content": [{"image_url": {"url": url}}, {"type": "image", "source": {"type": "url", "url": url}}]}
        ],
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}],
        "documents": {"content": [{"type": "image_url", "image_url": {"url": url}}]},
    }
    asked = {**places, "tools": [{"image_url": {"url": url}}], "metadata": {"image_url": url}}
    assert await fetcher(net).inline(asked)
    assert str(asked).count(DATA_URL) == 4
    assert len(net.allowed.hits) == 4
    assert not await fetcher(net).inline({"messages": [{"content": "see " + url}], "input": None, "text_1": 3})


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.8.8.8", False),
        ("10.1.2.3", False),
        ("172.31.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.1", False),
        ("192.0.2.1", False),
        ("224.0.0.1", False),
        ("239.1.1.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%1", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("ff0e::1", False),
        ("::ffff:8.8.8.8", False),
        ("::ffff:127.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("2001:db8::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize("url", ["https://allowed.test/a.png", "https://[2606:4700::1111]:8443/a.png"])
async def test_tls_is_of_the_name_and_the_connection_to_the_address(
    url: str, net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server: what httpx is asked to send."""
    seen: list[Any] = []

    async def send(_: Any, request: Any, **__: Any) -> Any:
        seen.append(request)
        raise media.httpx.ConnectError("closed")

    net.addresses["allowed.test"] = ["2606:4700::1", "8.8.8.8"]
    monkeypatch.setattr(media.httpx.AsyncClient, "send", send)
    slot = media.Slot({"url": url}, "url", "x", "image")
    with pytest.raises(media.httpx.ConnectError):
        await Fetcher(Api())._ask(media.httpx.URL(url), slot, 9)
    hosts = [request.url.host for request in seen]
    if "allowed" in url:
        assert hosts == ["2606:4700::1", "8.8.8.8"]
        assert seen[0].extensions["sni_hostname"] == seen[0].headers["host"] == "allowed.test"
    else:
        assert hosts == ["2606:4700::1111"]
        assert seen[0].headers["host"] == "[2606:4700::1111]:8443"
