"""The routes of the page: static files of the package, by their exact names."""

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
    """Answers the page itself."""
    return _file("index.html")


@router.get(
    "/page/{name}",
    response_class=Response,
    responses={200: {"content": {kind: {} for kind in TYPES.values()}}, 404: {"model": ErrorReply}},
)
async def file(name: str) -> Response:
    """Answers a style sheet, script or picture of the page."""
    return _file(name)


def _file(name: str) -> Response:
    """Returns a file of `FOLDER`. It is looked up in a listing, so that no name can lead out of the folder."""
    found = {path.name: path for path in FOLDER.iterdir() if path.suffix in TYPES}
    if name not in found:
        raise Refusal(status=404, message=f"the page has no file {name[:80]!r}", code="not_found")
    path = found[name]
    return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers={"cache-control": "no-cache"})
