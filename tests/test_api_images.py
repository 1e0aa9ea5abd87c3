"""Pictures in requests: what reaches the model, and what does not."""

from __future__ import annotations

import asyncio
import base64
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from aiohttp import web
from fake_backend import FakeBackend, served
from pictures import picture
from test_api_limits import refused

from t2ray.api import images
from t2ray.api.errors import Refusal
from t2ray.config.serve import ApiConfig
from t2ray.core import Image, user

FINE = picture(20, 10, 1)


def uri(image: Image | bytes, kind: str = "png") -> str:
    data = image if isinstance(image, bytes) else image.data
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def asked(*parts: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"model": "t2ray:base", "messages": [{"role": role, "content": list(parts)}], **more}


def bomb(width: int, height: int) -> bytes:
    """A PNG of that many pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def test_pictures_stand_where_they_stood_and_both_passes_work() -> None:
    backend = FakeBackend()
    body = asked({"type": "text", "text": "what is "}, part(uri(FINE), detail="low"), {"type": "text", "text": "17+25"})

    async def main() -> list[Any]:
        async with served(backend) as url, httpx2.AsyncClient(base_url=url) as http:
            return [await http.post("/v1/chat/completions", json=body | more) for more in ({}, {"model": "t2ray"})]

    base, dispatched = asyncio.run(main())
    assert base.status_code == dispatched.status_code == 200, base.text
    assert dispatched.json()["t2ray"]["label"] == "math"
    for prompt, _, _ in backend.calls:
        assert prompt == user(("what is ", FINE, "17+25"))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_the_formats_of_the_web_are_taken(kind: str) -> None:
    image = picture(20, 10, 1, kind.upper())
    found = asyncio.run(images.with_images([user((image, "?"))], ApiConfig()))
    assert found == [user((image, "?"))]


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        (uri(b"GIF89a"), "invalid_image", "a picture of 6 bytes is no PNG, JPEG, WEBP, GIF file"),
        (uri(picture(4, 4, 1, "BMP"), "bmp"), "invalid_image", "is no PNG, JPEG, WEBP, GIF file"),
        (uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "invalid_image", "is no PNG, JPEG, WEBP"),
        (uri(FINE.data[:-60]), "invalid_image", "its PNG file is broken"),
        (uri(bomb(5000, 5000)), "too_large", "25,000,000 pixels of a picture, more than the 16,777,216"),
        (uri(bomb(30_000, 30_000)), "invalid_image", "decompression bomb"),
        (uri(bomb(100, 100)), "invalid_image", "its PNG file is broken"),
        ("data:image/png;base64,not base64!", "invalid_value", "is not base64"),
        ("data:text/html;base64,aGk=", "invalid_value", "a picture's url begins with data:image/png;base64"),
        ("data:image/png,rawbytes", "invalid_value", "a picture's url begins with data:image/png;base64"),
        ("file:///etc/passwd", "invalid_value", "a picture's url begins with"),
        ("/etc/passwd", "invalid_value", "a picture's url begins with"),
        ("https://example.org/a.png", "image_host", "pictures are not fetched from 'example.org'; send the picture"),
        ("http://[::1/a.png", "image_host", "pictures are not fetched from ''"),
    ],
)
def test_what_is_no_picture_is_refused_before_the_model_is_asked(url: str, code: str, message: str) -> None:
    status, error = refused(asked(part(url)), config=ApiConfig())
    assert (status, error["code"]) == (400, code), error
    assert message in error["message"]


def test_there_may_be_so_many_pictures_of_so_many_bytes() -> None:
    status, error = refused(asked(*[part(uri(FINE))] * 3), config=ApiConfig(max_images=2))
    assert (status, error["code"], error["param"]) == (400, "too_large", "messages")
    assert "3 pictures, more than the 2" in error["message"]
    status, error = refused(asked(part(uri(FINE))), config=ApiConfig(max_image_bytes=100))
    assert status == 400 and "bytes of a picture, more than the 100" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        asked(part(uri(FINE)), role="system"),
        asked({"type": "image_url", "image_url": uri(FINE)}),
        asked({"type": "input_audio", "input_audio": {}}),
        asked(part(uri(FINE), quality=1)),
        asked(7),
        asked({"type": "text", "text": 7}),
    ],
)
def test_a_part_of_another_form_is_refused(body: dict[str, Any]) -> None:
    status, error = refused(body, config=ApiConfig())
    assert status == 400 and error["param"] == "messages[0].content"


# ------------------------------------------------------------------------------------------------- remote addresses


@asynccontextmanager
async def site(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_get("/{name}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    server = web.TCPSite(runner, "127.0.0.1", 0)
    await server.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def fetched(path: str, monkeypatch: pytest.MonkeyPatch, *, public: bool, limit: int = 10_000) -> Any:
    """What comes of asking for a picture on a host that is allowed; its address counts as `public`, or as it is."""

    async def answer(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name == "moved.png":
            raise web.HTTPFound("/fine.png")
        if name == "endless.png":
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(100):
                await response.write(b"\0" * 10_000)
            return response
        return web.Response(body=FINE.data) if name == "fine.png" else web.Response(status=404)

    async def main() -> Any:
        async with site(answer) as port:
            config = ApiConfig(image_hosts=("localhost",), max_image_bytes=limit)
            prompt = user((Image(path=f"http://localhost:{port}/{path}"), "?"))
            return await images.with_images([prompt], config)

    if public:
        monkeypatch.setattr("ipaddress.IPv4Address.is_global", True)
        monkeypatch.setattr("ipaddress.IPv6Address.is_global", True)
    try:
        return asyncio.run(main())
    except Refusal as refusal:
        return refusal.message


def test_a_picture_comes_from_an_allowed_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the host is this machine, which counts as public for once."""
    assert fetched("fine.png", monkeypatch, public=True) == [user((FINE, "?"))]
    assert fetched("moved.png", monkeypatch, public=True) == "localhost answers 302 for a picture"
    assert fetched("none.png", monkeypatch, public=True) == "localhost answers 404 for a picture"
    assert "bytes of a picture, more than the 10,000" in fetched("endless.png", monkeypatch, public=True)


def test_an_allowed_host_at_a_private_address_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetched("fine.png", monkeypatch, public=False) == "a picture cannot be fetched from localhost"


def test_an_address_in_numbers_is_no_host_that_could_be_allowed() -> None:
    config = ApiConfig(image_hosts=("127.0.0.1", "::1"))
    for url in ("http://127.0.0.1:1/a.png", "http://[::1]:1/a.png"):
        with pytest.raises(Refusal) as raised:
            asyncio.run(images.with_images([user((Image(path=url), "?"))], config))
        assert "pictures are not fetched from" in raised.value.message
