"""The pictures of requests: fetched from hosts that are allowed by name, held to limits, and found whole.

Not here: `data:` URIs, which are read with the body (`body`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from t2ray.api.limits import at_most, invalid
from t2ray.config.serve import ApiConfig
from t2ray.core import ConfigError, Image, Message, Prompt
from t2ray.pictures import opened, rgb
from t2ray.prompts import pictured

P = TypeVar("P", bound=Prompt)

FETCH_S = 10.0
"""Seconds in which a picture has to arrive."""


async def with_images(prompts: Sequence[P], config: ApiConfig) -> list[P]:
    """Returns the prompts with all their pictures, which are within the limits and whole.

    Raises:
        Refusal: 400, there are too many, one is too large or broken, or its host is not allowed or does not give it.
    """
    count = sum(len(message.images) for prompt in prompts for message in pictured(prompt))
    at_most(config.max_images, count, "messages", "pictures")
    return [cast(P, await _whole(pictured(prompt), config)) if pictured(prompt) else prompt for prompt in prompts]


async def _whole(messages: tuple[Message, ...], config: ApiConfig) -> tuple[Message, ...]:
    found = []
    for message in messages:
        if message.images:
            parts = [await _checked(p, config) if isinstance(p, Image) else p for p in message.content]
            message = replace(message, content=tuple(parts))
        found.append(message)
    return tuple(found)


async def _checked(image: Image, config: ApiConfig) -> Image:
    if image.path:
        image = Image(data=await _fetched(image.path, config))
    at_most(config.max_image_bytes, len(image.data), "messages", "bytes of a picture")
    try:
        width, height = opened(image).size
        at_most(config.max_image_pixels, width * height, "messages", "pixels of a picture")
        await asyncio.to_thread(rgb, image)  # a broken one is refused before anything is computed for it
    except ConfigError as error:
        raise invalid(str(error), "messages", "invalid_image") from None
    return image


async def _fetched(url: str, config: ApiConfig) -> bytes:
    """Returns what an address has, if its host is allowed; one that points elsewhere is not followed."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        host = ""
    if host not in config.image_hosts or _is_address(host):
        raise invalid(
            f"pictures are not fetched from {host[:80]!r}; send the picture itself, as data:image/png;base64,...",
            "messages",
            "image_host",
        )
    limit = config.max_image_bytes
    try:
        connector = aiohttp.TCPConnector(resolver=PublicResolver(), use_dns_cache=False)
        timeout = aiohttp.ClientTimeout(total=FETCH_S)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise invalid(f"{host} answers {response.status} for a picture", "messages", "image_fetch")
            data = bytearray()
            async for chunk in response.content.iter_chunked(65_536):
                data += chunk
                at_most(limit, len(data), "messages", "bytes of a picture")
            return bytes(data)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        raise invalid(f"a picture cannot be fetched from {host}", "messages", "image_fetch") from None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class PublicResolver(AbstractResolver):
    """Finds the addresses of a host, and gives none that is not public: what is connected to is what was checked."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Returns the addresses of a host.

        Raises:
            OSError: it has none, or one that is private.
        """
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        for *_, address in found:
            if not ipaddress.ip_address(address[0]).is_global:
                raise OSError(f"{host} is at {address[0]}, which is not public")
        return [
            ResolveResult(hostname=host, host=str(address[0]), port=port, family=kind, proto=proto, flags=0)
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        """Nothing is held."""
