"""What the network can ask of the page: nothing but what the page itself asks."""

import http.client
import json
import os
import sys
from urllib.parse import quote, urlsplit

import pytest

ROUTES = ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/file/", "/static/", "/assets/", "/svelte/",
          "/gradio_api/proxy=", "/proxy=", "/gradio_api/custom_component/", "/gradio_api/stream/",
          "/gradio_api/run-history/records/")  # fmt: skip


def asked(page, method, path, body=None, headers=None):
    """The status and the body of an answer; the path goes out as it is, dots and all."""
    connection = http.client.HTTPConnection(urlsplit(page.url).netloc, timeout=20)
    connection.request(method, path, body=body, headers=headers or {})
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def refused(status):
    return 400 <= status < 500


@pytest.fixture
def secret(tmp_path):
    """A file of this machine that is nobody's business."""
    path = tmp_path / "secret.txt"
    path.write_text("do not tell")
    return path


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_gives_a_file_of_this_machine(served_page, secret, route):
    up = "../" * 12
    inner = served_page.folder / "x"
    forms = [
        str(secret),
        quote(str(secret), safe=""),
        f"{up}{str(secret)[1:]}",
        f"..%2f..%2f..%2f..%2f..%2f..%2f..{quote(str(secret), safe='')}",
        f"%252e%252e%252f%252e%252e{secret}",
        f"{inner}/../../..{secret}",
        f"{inner}/%2e%2e/%2e%2e/%2e%2e{secret}",
        f"..\\..\\..{secret}",
        f"file://{secret}",
        f"{secret}%00.png",
        f"/{secret}",
        f"C:/{up}{secret}",
    ]
    for form in forms:
        for method in ("GET", "HEAD"):
            status, body, _ = asked(served_page, method, route + form)
            assert refused(status), (route, form, status)
            assert b"do not tell" not in body


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/file=https://example.org/x.png",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/gradio_api/openapi.json",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/monitoring",
        "/gradio_api/dev/reload",
        "/gradio_api/vibe-code",
        "/gradio_api/deep_link",
        "/login_check/../config/../gradio_api/runs",
        "/gradio_api/mcp/",
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(served_page, path):
    assert refused(asked(served_page, "GET", path)[0])
    assert refused(asked(served_page, "POST", path, b"{}", {"content-type": "application/json"})[0])


def test_a_link_out_of_the_folder_is_not_followed(served_page, secret):
    link = served_page.folder / "link.txt"
    link.symlink_to(secret)
    try:
        assert asked(served_page, "GET", f"/gradio_api/file={link}")[0] == 403
    finally:
        link.unlink()


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_closed(served_page, method):
    assert refused(asked(served_page, method, "/")[0])


def files(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def test_no_event_may_name_a_file_that_was_not_uploaded(served_page, secret, monkeypatch):
    config = json.loads(asked(served_page, "GET", "/config")[1])
    restore = next(
        one["id"] for one in config["dependencies"] if any(event == "upload" for _, event in one["targets"])
    )
    reached = []
    import socket

    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda where, *a, **k: reached.append(where) or connect(where, *a, **k)
    )
    forms = [
        files(str(secret)),
        files(f"{served_page.folder}/../{secret.name}"),
        files(str(served_page.folder)),
        files("http://127.0.0.1:1/x.png"),
        files("https://example.org/x.png", url="https://example.org/x.png"),
        files("data:image/png;base64,AAAA"),
        files("secret.txt"),
        files(7),
        {"root": [files(str(secret))]},
        {"background": None, "layers": [files(str(secret))], "composite": None},
    ]
    for form in forms:
        event = {"data": [form, None], "fn_index": restore, "session_hash": "s", "trigger_id": 1}
        body = json.dumps(event).encode()
        status, answer, _ = asked(
            served_page, "POST", "/gradio_api/queue/join", body, {"content-type": "application/json"}
        )
        assert status == 403, form
        assert b"do not tell" not in answer
    assert {host for host, _ in reached} <= {urlsplit(served_page.url).hostname}
    for route in ("run/predict", "api/predict", "call/restore", "call/v2/restore", "process_recording"):
        body = json.dumps({"data": forms[:1]}).encode()
        status = asked(
            served_page, "POST", f"/gradio_api/{route}", body, {"content-type": "application/json"}
        )[0]
        assert refused(status), route


def test_what_is_too_large_is_not_taken(served_page):
    large = b"x" * (22 * 2**20)
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert asked(served_page, "POST", "/gradio_api/upload", large, headers)[0] == 413
    assert asked(served_page, "POST", "/gradio_api/queue/join", b"[" * 2**21, {})[0] == 413
    deep = b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert asked(served_page, "POST", "/gradio_api/queue/join", deep, {})[0] == 403


def test_another_name_for_this_machine_is_refused(served_page):
    assert asked(served_page, "GET", "/config", headers={"host": "evil.example:7860"})[0] == 403
    assert asked(served_page, "GET", "/config", headers={"host": "127.0.0.1.evil.example"})[0] == 403
    port = urlsplit(served_page.url).port
    assert asked(served_page, "GET", "/config", headers={"host": f"localhost:{port}"})[0] == 200


def test_the_page_is_private_and_lets_in_nothing_from_outside(served_page):
    status, body, headers = asked(served_page, "GET", "/")
    named = {name.lower(): value for name, value in headers.items()}
    assert status == 200
    assert "default-src 'self'" in named["content-security-policy"]
    assert named["x-content-type-options"] == "nosniff"
    for outside in (b"googleapis", b"gstatic", b"cdnjs", b"jsdelivr", b"unpkg", b"gradio.live"):
        assert outside not in body
    assert served_page.shared is None
    assert urlsplit(served_page.url).hostname == "127.0.0.1"
    assert os.stat(served_page.folder).st_mode & 0o077 == 0
    config = json.loads(asked(served_page, "GET", "/config")[1])
    assert not config.get("analytics_enabled")
    called = [one for one in config["dependencies"] if one["backend_fn"] and one["inputs"]]
    assert called and all(one["api_visibility"] == "private" for one in called)
    assert str(served_page.folder).encode() not in body  # nobody is told where files lie


def test_an_uploaded_page_is_not_shown_as_one(served_page):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.html"\r\n'
        b"Content-Type: text/html\r\n\r\n<script>alert(1)</script>\r\n--x--\r\n"
    )
    status, answer, _ = asked(
        served_page, "POST", "/gradio_api/upload", body, {"content-type": "multipart/form-data; boundary=x"}
    )
    if status == 200:
        _, _, headers = asked(served_page, "GET", f"/gradio_api/file={json.loads(answer)[0]}")
        named = {name.lower(): value for name, value in headers.items()}
        assert named["content-disposition"].startswith("attachment")


def test_nothing_is_left_when_the_page_ends(app_models, app_limits):
    pytest.importorskip("gradio", reason="the extra app is not installed")
    from lediflow.app.serve import served

    before = os.environ.get("GRADIO_TEMP_DIR")
    with served(app_models, app_limits) as page:
        assert page.folder.is_dir()
        taken = urlsplit(page.url).port
        from lediflow.errors import UserError

        with (
            pytest.raises(UserError, match=f"cannot listen at 127.0.0.1, port {taken}"),
            served(app_models, app_limits, port=taken),
        ):
            pass
    assert not page.folder.exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == before


def test_without_gradio_the_extra_is_named(app_models, app_limits, monkeypatch):
    from lediflow.app.serve import served
    from lediflow.errors import UserError

    for name in [name for name in sys.modules if name.startswith(("lediflow.app.page", "lediflow.app.tabs"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with (
        pytest.raises(UserError, match=r"pip install 'lediflow\[app\]'"),
        served(app_models, app_limits),
    ):
        pass
