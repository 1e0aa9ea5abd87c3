"""The page: static files of the package, by their exact names. Called by `app`."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from t2ray.api.errors import ErrorReply, Refusal

FOLDER = Path(__file__).parents[1] / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

router = APIRouter()


@router.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}, 404: {"model": ErrorReply}})
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get(
    "/page/{name}",
    response_class=Response,
    responses={200: {"content": {kind: {} for kind in TYPES.values()}}, 404: {"model": ErrorReply}},
)
async def file(name: str) -> Response:
    """A file of the page."""
    return _file(name)


def _file(name: str) -> Response:
    """Chosen from a listing, so that no name leads out of the folder."""
    found = {path.name: path for path in FOLDER.iterdir() if path.suffix in TYPES}
    if name not in found:
        raise Refusal(status=404, message=f"the page has no file {name[:80]!r}", code="not_found")
    path = found[name]
    return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers={"cache-control": "no-cache"})
