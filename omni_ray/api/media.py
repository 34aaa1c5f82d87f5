"""Fetches the media that a request names by URL, from the hosts that the YAML allows, and puts them into its body.

Nothing else in the cluster fetches: vLLM is told to refuse every URL that it is given. So a URL is checked in this one
place, for models of all types.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from omni_ray.api.wording import shown
from omni_ray.config.spec import Api
from omni_ray.errors import RequestError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URLS = 32
MAX_REDIRECTS = 3
DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
ROOTS = (
    "messages", "images", "mask", "input_reference",
    "input", "query", "queries", "documents", "text_1", "text_2", "data_1", "data_2",
)  # fmt: skip
"""Where bodies hold media."""
KINDS = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


class NotFetched(RequestError):
    """A URL that must not be fetched, or that has no media. The code is OpenAI's."""

    code = "invalid_image_url"


@dataclass(slots=True)
class Slot:
    """A URL in a body: ``holder[key]``, at the dotted path ``where``, which should name media of this ``kind``."""

    holder: dict[str, Any]
    key: str
    where: str
    kind: str

    @property
    def url(self) -> str:
        return str(self.holder[self.key])

    def refuse(self, problem: str) -> NotFetched:
        return NotFetched(f"{self.where}: {shown(self.url)} {problem}", param=self.where)


class Fetcher:
    """Fetches what ``api.media_hosts`` allows."""

    def __init__(self, api: Api) -> None:
        self._hosts = frozenset(api.media_hosts)
        self._networks = [ipaddress.ip_network(network) for network in api.media_networks]
        self._max_bytes = int(api.media_max_mib * 2**20)
        self._timeout_s = api.media_timeout_s

    async def inline(self, body: dict[str, Any]) -> bool:
        """Replace every http and https URL of media in ``body`` by a ``data:`` URL; True if there were any.

        :raises NotFetched: a URL is not allowed, or nothing that is wanted comes from it; told by the field's name.
        """
        slots = [slot for slot in _slots(body) if re.match(r"[\x00-\x20]*https?:", slot.url, re.IGNORECASE)]
        if len(slots) > MAX_URLS:
            raise slots[MAX_URLS].refuse(f"is one too many: at most {MAX_URLS} URLs are fetched for a request")
        left = self._max_bytes
        try:
            async with asyncio.timeout(self._timeout_s):
                for slot in slots:
                    kind, data = await self._fetch(slot, left)
                    left -= len(data)
                    slot.holder[slot.key] = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        except TimeoutError:
            raise slot.refuse(f"did not come within the {self._timeout_s:g} s of api.media_timeout_s") from None
        return bool(slots)

    async def _fetch(self, slot: Slot, max_bytes: int) -> tuple[str, bytes]:
        """Media type and content. Every hop of a redirect is checked as the first one is."""
        try:
            url = httpx.URL(slot.url)
            for _ in range(MAX_REDIRECTS + 1):
                self._check(url, slot)
                answer = await self._ask(url, slot, max_bytes)
                if not isinstance(answer, str):
                    return answer
                url = url.join(answer)
        except httpx.InvalidURL:
            raise slot.refuse("is no URL, or leads to none") from None
        except httpx.HTTPError:
            raise slot.refuse("cannot be fetched: its host does not answer as HTTP") from None
        raise slot.refuse(f"leads through more than {MAX_REDIRECTS} redirects")

    def _check(self, url: httpx.URL, slot: Slot) -> None:
        host = url.raw_host.decode("ascii").lower()
        if url.scheme not in DEFAULT_PORTS or url.userinfo:
            raise slot.refuse("has or leads to a URL that is not plain http or https")
        parents = [host.split(".", i)[-1] for i in range(1, host.count(".") + 1)]
        port = "" if url.port is None else f":{url.port}"
        if self._hosts.isdisjoint({host + port, *(f"*.{parent}{port}" for parent in parents)}):
            raise slot.refuse(
                f"is not fetched: the host {shown(host + port)} is none that api.media_hosts allows; send the media as "
                "a data: URL"
            )

    async def _ask(self, url: httpx.URL, slot: Slot, max_bytes: int) -> tuple[str, bytes] | str:
        """The content, or where a redirect leads. The connection goes to an address that was checked, and no name is
        looked up again, so that a name that changes its address between the two gains nothing."""
        addresses = await self._addresses(url, slot)
        for address in addresses:
            try:
                return await self._ask_at(address, url, slot, max_bytes)
            except httpx.ConnectError:
                if address is addresses[-1]:
                    raise
        raise AssertionError

    async def _addresses(self, url: httpx.URL, slot: Slot) -> list[Address]:
        host, port = url.raw_host.decode("ascii"), url.port or DEFAULT_PORTS[url.scheme]
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise slot.refuse(f"is not fetched: the name {shown(host)} has no address") from None
        addresses = list(dict.fromkeys(ipaddress.ip_address(each[4][0]) for each in found))
        if not all(is_public(each) or any(each in network for network in self._networks) for each in addresses):
            raise slot.refuse(
                f"is not fetched: the host {shown(host)} is not in the public internet, nor in api.media_networks"
            )
        return addresses

    async def _ask_at(self, address: Address, url: httpx.URL, slot: Slot, max_bytes: int) -> tuple[str, bytes] | str:
        # A client of its own: its pool would reuse a connection to this address that was made for another name.
        async with httpx.AsyncClient(verify=_tls(), trust_env=False, timeout=self._timeout_s) as client:
            request = client.build_request(
                "GET",
                url.copy_with(host=str(address)),
                headers={"host": url.netloc.decode("ascii"), "accept-encoding": "identity"},
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
            )
            response = await client.send(request, stream=True)
            try:
                if response.status_code in REDIRECTS and "location" in response.headers:
                    return str(response.headers["location"])
                return _media_type(response, slot), await _read(response, slot, max_bytes)
            finally:
                await response.aclose()


def is_public(address: Address) -> bool:
    """Whether it is a global unicast address: not loopback, private, link-local, shared (CGNAT), multicast or reserved,
    nor one of those inside IPv6, which IPv4-mapped, 6to4, Teredo and NAT64 addresses can be."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    return address in GLOBAL_UNICAST and address.is_global and address.sixtofour is None and address.teredo is None


def _slots(body: dict[str, Any]) -> Iterator[Slot]:
    for root in ROOTS:
        yield from _slots_below(body.get(root), root)


def _slots_below(value: Any, where: str) -> Iterator[Slot]:
    """Of OpenAI's parts (``image_url`` is an object with a ``url``, or the URL), and Anthropic's ``source``."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _slots_below(item, f"{where}.{i}")
    if not isinstance(value, dict):
        return
    for key, child in value.items():
        if key in KINDS and isinstance(child, str):
            yield Slot(value, key, f"{where}.{key}", KINDS[key])
        elif key in (*KINDS, "source") and isinstance(child, dict) and isinstance(child.get("url"), str):
            yield Slot(child, "url", f"{where}.{key}.url", KINDS.get(key, "image"))
        else:
            yield from _slots_below(child, f"{where}.{key}")


def _media_type(response: httpx.Response, slot: Slot) -> str:
    if response.status_code != 200:
        raise slot.refuse(f"cannot be fetched: its host answers {response.status_code}")
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not re.fullmatch(rf"{slot.kind}/[a-z0-9.+-]+", kind):
        raise slot.refuse(f"is no {slot.kind}: its content-type is {shown(kind)}")
    return str(kind)


async def _read(response: httpx.Response, slot: Slot, max_bytes: int) -> bytes:
    data = bytearray()
    if response.headers.get("content-length", "0").isdecimal():
        _check_size(int(response.headers.get("content-length", "0")), slot, max_bytes)
    async for piece in response.aiter_raw():
        data += piece
        _check_size(len(data), slot, max_bytes)
    return bytes(data)


def _check_size(num_bytes: int, slot: Slot, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise slot.refuse(f"is too large: {max_bytes} bytes are left of api.media_max_mib for this request")


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)
