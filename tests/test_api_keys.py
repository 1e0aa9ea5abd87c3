"""Who may ask: keys from a file and from the environment, and what a user's key does not open."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_backend import FakeBackend

from t2ray.api.app import create_api
from t2ray.api.keys import ANYONE, Keys, new_key
from t2ray.config.serve import ApiConfig
from t2ray.core import ConfigError


def test_a_new_key_is_random_and_its_line_holds_no_secret(tmp_path: Path) -> None:
    (secret, line), (other, _) = new_key("ann", "user"), new_key("ann", "user")
    assert secret != other and len(secret) > 40
    assert secret not in line and line.startswith("user ann sha256:")
    file = tmp_path / "keys"
    file.write_text(f"# people\n\n{line}  # Ann\n{new_key('root', 'admin')[1]}\n")
    file.chmod(0o644)
    keys = Keys.load(ApiConfig(keys_file=str(file), keys_env="UNSET"))
    found = keys.find(f"Bearer {secret}")
    assert len(keys) == 2 and found is not None and (found.name, found.role) == ("ann", "user")
    assert keys.find(f"bearer  {secret} ") == found
    for wrong in (
        "",
        secret,
        f"Basic {secret}",
        f"Bearer {secret[:-1]}",
        f"Bearer {other}",
        "Bearer ",
        "Bearer é\xff",
    ):
        assert keys.find(wrong) is None
    with pytest.raises(ConfigError, match="cannot be this key's name"):
        new_key("../ann", "user")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user ann", "keys:1: not a key"),
        ("root ann sha256:" + "0" * 64, "keys:1: not a key"),
        ("user ann sha256:" + "0" * 63, "keys:1: not a key"),
        ("user ANN sha256:" + "0" * 64, "cannot be this key's name"),
        (f"user ann sha256:{'0' * 64}\nadmin ann sha256:{'1' * 64}", "two API keys have the name 'ann'"),
    ],
)
def test_a_keys_file_with_a_mistake_is_refused_without_showing_it(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as refused:
        create_api(ApiConfig(keys_file=str(file)))
    assert "000" not in str(refused.value)


def test_a_keys_file_that_is_missing_or_open_to_others_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(ConfigError, match="is no file"):
        create_api(ApiConfig(keys_file=str(file)))
    file.write_text(new_key("ann", "user")[1])
    for mode in (0o660, 0o602):
        file.chmod(mode)
        with pytest.raises(ConfigError, match=f"chmod go-w {file}"):
            create_api(ApiConfig(keys_file=str(file)))


@pytest.mark.parametrize(
    ("text", "said"), [("user:short", "fewer than 16"), ("secret-without-a-role-in-front", "no role")]
)
def test_a_key_in_the_environment_must_have_a_role_and_some_length(
    monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.setenv("T2RAY_API_KEYS", text)
    with pytest.raises(ConfigError, match=said) as refused:
        create_api(ApiConfig())
    assert "secret" not in str(refused.value) and "short" not in str(refused.value)


def test_without_keys_everyone_may_do_everything() -> None:
    keys = Keys.load(ApiConfig(keys_env="UNSET"))
    assert len(keys) == 0 and keys.find("") is ANYONE and ANYONE.role == "admin"


def test_every_route_asks_for_a_key_and_admin_routes_for_an_admins(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    user, root = "user-key-of-the-tests", "root-key-of-the-tests"
    monkeypatch.setenv("T2RAY_API_KEYS", f"user:{user}, admin:{root}")
    caplog.set_level("DEBUG")
    app = create_api(ApiConfig())
    app.state.backend = FakeBackend()
    admin = {("POST", "/v1/adaptations"), ("PUT", "/v1/experts/{name}"), ("DELETE", "/v1/experts/{name}")}

    async def main() -> None:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://any.host") as http:
            routes = [(method.upper(), path) for path, one in app.openapi()["paths"].items() for method in one]
            assert admin <= set(routes)
            for method, path in [*routes, ("GET", "/v1/none"), ("GET", "/docs"), ("OPTIONS", "/v1/models")]:
                url = path.format(name="math", model="t2ray", id="x")
                statuses = []
                for key in (None, "wrong", user, root):
                    headers = {} if key is None else {"authorization": f"Bearer {key}"}
                    response = await http.request(method, url, headers=headers)
                    statuses.append(response.status_code)
                    if response.status_code == 401:
                        assert response.headers["www-authenticate"] == "Bearer"
                        assert response.json()["error"]["code"] == "invalid_api_key"
                if path in ("/", "/health") or path.startswith("/page/"):
                    assert 401 not in statuses
                    continue
                assert statuses[:2] == [401, 401] and 401 not in statuses[2:], (method, path)
                assert (statuses[2] == 403) == ((method, path) in admin)
                assert statuses[3] != 403
            assert "math" not in app.state.backend.experts  # deleted once, by the admin's key

    asyncio.run(main())
    for secret in (user, root, "wrong"):
        assert f"Bearer {secret}" not in caplog.text and f'"{secret}"' not in caplog.text


def test_an_upload_by_a_user_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2RAY_API_KEYS", "user:user-key-of-the-tests")
    app = create_api(ApiConfig())
    app.state.backend = FakeBackend()
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    for headers, status in ([(b"authorization", b"Bearer user-key-of-the-tests")], 403), ([], 401):
        scope = {
            "type": "http", "method": "PUT", "path": "/v1/experts/x", "query_string": b"", "root_path": "",
            "headers": headers,
        }  # fmt: skip
        sent.clear()
        asyncio.run(app(scope, receive, send))
        assert sent[0]["status"] == status
