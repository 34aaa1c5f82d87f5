"""Uploads and requests that mean no good: each gets its 4xx soon, and nothing of them stays."""

from __future__ import annotations

import io
import random
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.conftest import Server

pytestmark = pytest.mark.cluster

NUM_UPLOADS = 200
SOON_S = 10.0
"""On a machine of two cores that does other work as well; alone it is a few milliseconds."""


def png(width: int, height: int, num_rows: int = 0) -> bytes:
    """A black picture of that size by its own account, of which only the first rows are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + width // 8)) for _ in range(num_rows)) + rows.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def picture(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 40).convert("RGB").save(buffer, format=format)
    return buffer.getvalue()


def bad_files() -> Iterator[tuple[str, bytes]]:
    """Names and contents, without end."""
    dice = random.Random(0)
    whole = [picture(format) for format in ("PNG", "JPEG", "WEBP")]
    fixed = [b"", b"\x00" * 64, b"GIF89a" + bytes(64), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"]
    fixed += [
        picture("GIF"),
        picture("TIFF"),
        picture("BMP"),
        png(20_000, 20_000, num_rows=20_000),
        png(2**31 - 1, 2**31 - 1),
    ]
    yield from (("picture.png", each) for each in fixed)
    while True:
        each = dice.choice(whole)
        yield "picture.png", each[: dice.randrange(1, len(each) * 9 // 10)]


def upload(server: Server, path: str, field: str, file: tuple[str, bytes]) -> httpx.Response:
    fields = {"model": "demo-image" if "images" in path else "demo-video", "prompt": "a red circle"}
    return httpx.post(f"{server.url}{path}", data=fields, files={field: file}, timeout=30)


def busy(server: Server) -> int:
    groups = httpx.get(f"{server.url}/ready", timeout=30).json()["groups"]
    return sum(group["num_running"] + group["num_queued"] for group in groups)


def memory(server: Server) -> int:
    processes = server.find("ray::ServeReplica:omni:Api") + server.find("ray::ServeReplica:omni:Router")
    return sum(process.memory_info().rss for process in processes)


def test_hostile_uploads(server: Server) -> None:
    paths = [("/v1/images/edits", "image"), ("/v1/images/edits", "mask"), ("/v1/videos", "input_reference")]
    files = bad_files()
    for number in range(NUM_UPLOADS // 4):  # what is allocated once
        upload(server, *paths[number % 3], next(files))
    before, files = memory(server), bad_files()
    for number in range(NUM_UPLOADS):
        start = time.monotonic()
        reply = upload(server, *paths[number % 3], next(files))
        assert 400 <= reply.status_code < 500, (number, reply.text)
        assert time.monotonic() - start < SOON_S, (number, reply.text)
    assert busy(server) == 0
    assert memory(server) < 1.05 * before
    assert httpx.get(f"{server.url}/v1/jobs", params={"limit": "1"}, timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nv\r\n--x--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 9000, b"--x--"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 400),
        ("application/x-www-form-urlencoded", b"model=demo-image"),
        ("application/json", b'{"model": "demo-image"}'),
    ],
)
def test_broken_forms(server: Server, content_type: str, body: bytes) -> None:
    url = f"{server.url}/v1/images/edits"
    reply = httpx.post(url, content=body, headers={"content-type": content_type}, timeout=30)
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["error"]["message"]


def test_a_gigabyte_that_is_only_declared(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        "POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        f"Content-Length: {2**30}\r\n\r\n--x\r\n"
    )
    start = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - start < SOON_S


@pytest.mark.thorough
def test_no_request_that_the_document_allows_breaks_the_server(server: Server, tmp_path: Path) -> None:
    """Schemathesis makes requests of `/openapi.json`; here some, `--max-examples` makes more."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--max-examples", "15", "--phases", "fuzzing", "--seed", "1"]
    command += ["--exclude-path", "/metrics", "--request-timeout", "60", "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"[1-9]\d* generated", done.stdout), done.stdout[-2000:]
