"""Who is answered, what uploads may do, what errors tell, and clients that are slow or leave."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import json
import signal
import socket
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.types import Receive, Scope, Send

from fastdiff.cli import main
from fastdiff.cli.serve import read_keys
from fastdiff.generate.model import Model, with_generate
from fastdiff.serve import uploads as uploads_module
from fastdiff.serve.app import Service, create_app
from fastdiff.serve.errors import ApiError, in_our_words
from fastdiff.serve.http import bind, is_loopback, protocol_class
from fastdiff.serve.limits import MIB, Limits
from fastdiff.serve.schema import Generation, read_generation
from fastdiff.serve.uploads import Form, Uploads
from tests.serve.client import (
    Answer,
    Running,
    ask,
    file_of,
    form_of,
    running,
    service_of,
)
from tests.support.tiny import tiny_model

JSON = {"content-type": "application/json"}
GENERATIONS = "/v1/images/generations"
BODY = b'{"prompt": "one", "num_inference_steps": 1}'
LONG = json.dumps({"prompt": "one", "num_inference_steps": 200, "sampler": "ddim"}).encode()


@pytest.fixture(scope="module")
def model() -> Model:
    return with_generate(tiny_model())


def answered(service: Service, path: str, body: bytes = b"", **headers: str) -> Answer:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    method = "POST" if path.startswith("/v1/images") else "GET"
    return asyncio.run(ask(create_app(service), path, body, given, method))


# --- who is answered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""]
)
def test_a_name_that_leads_here_is_refused(model: Model, host: str) -> None:
    """DNS rebinding: a web page whose name resolves to 127.0.0.1."""
    service = service_of(model)
    for path in (GENERATIONS, "/v1/models", "/metrics"):
        assert answered(service, path, BODY, host=host).json["error"]["code"] == "wrong_host"
    assert answered(service, "/v1/models", host="[::1]:8000").status == 200


def test_requests_of_web_pages_are_refused(model: Model) -> None:
    service = service_of(model)
    page = answered(
        service, GENERATIONS, BODY, content_type="application/json", origin="http://evil.example"
    )
    assert (page.status, page.json["error"]["code"]) == (403, "wrong_origin")
    form = answered(service, GENERATIONS, BODY, content_type="text/plain")
    assert (form.status, form.json["error"]["code"]) == (415, "wrong_content_type")


def test_keys(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a" * 20 + "\n\n" + "b" * 20 + "\n")
    service = service_of(model, keys=read_keys(file), local=False)
    assert answered(service, "/v1/models", authorization="Bearer " + "b" * 20).status == 200
    for wrong in ("", "Bearer ", "Bearer " + "c" * 20, "Basic " + "b" * 20, "b" * 20):
        for path in (GENERATIONS, "/v1/images/edits", "/v1/models", "/metrics"):
            answer = answered(service, path, BODY, authorization=wrong)
            assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key")
    assert answered(service, "/ready").status == 503  # no key is needed; the worker is not started
    assert hashlib.sha256(b"a" * 20).digest() in service.keys


def test_a_key_limits_priority_and_images(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a" * 20 + " priority=normal images=2\n" + "b" * 20 + "\n")
    service = service_of(model, keys=read_keys(file), local=False)

    def refused(key: str, **fields: Any) -> tuple[int, str]:
        body = json.dumps({"num_inference_steps": 1, **fields}).encode()
        found = answered(
            service, GENERATIONS, body,
            content_type="application/json", authorization=f"Bearer {key * 20}",
        )  # fmt: skip
        return found.status, found.json["error"]["code"]

    assert refused("a", priority="high") == (403, "priority_not_allowed")
    assert refused("a", n=3) == (400, "too_many_images")
    assert refused("a", priority="top") == (400, "invalid_type")
    key = hashlib.sha256(b"a" * 20).digest()
    facts = service.worker.facts
    two = read_generation(Generation(n=2), facts, service.limits)
    with service.held(key, two):
        assert refused("a") == (429, "too_many_images")
    service.worker.stop()  # so that what passes is refused by the worker
    assert refused("a", priority="normal", n=2) == (503, "unavailable")
    assert refused("b", priority="high", n=3) == (503, "unavailable")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no API key"),
        ("short", "16 letters"),
        ("é" * 20, "key 1"),
        ("a" * 20 + " admin", "may be followed by priority=NAME and images=N, got 'admin'"),
        ("a" * 20 + " images=0", "images must be at least 1"),
        ("a" * 20 + " priority=top", "priority must be low, normal or high"),
        ("a" * 20 + "\n" + "a" * 20, "key 2 in .* is there twice"),
    ],
)
def test_key_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_keys(file)


def test_other_machines_need_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "it needs --api-key-file" in capsys.readouterr().err
    hosts = {"127.0.0.1": True, "::1": True, "localhost": True, "0.0.0.0": False, "a.b": False}
    assert {host: is_loopback(host) for host in hosts} == hosts


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "give another --host or --port" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--port", "70000"], ["--slots", "0"], ["--limits.queue", "0"]])
def test_options_that_make_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *words]) == 2
    assert words[0] in capsys.readouterr().err


# --- what errors tell ---------------------------------------------------------------------------


def test_a_bug_tells_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr("fastdiff.serve.app.read_generation", broken)
    with running(service_of(model)) as server:
        status, _, body = post(server, BODY)
    assert (status, b"secret" in body) == (500, False)
    assert json.loads(body)["error"]["type"] == "server_error"


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/v1/images/generations", 405)])
def test_wrong_routes_are_errors_in_the_same_format(model: Model, path: str, status: int) -> None:
    answer = asyncio.run(ask(create_app(service_of(model)), path, b"", {}, "GET"))
    assert answer.status == status
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_advice_for_commands_is_left_out() -> None:
    text = "steps must be 1, got 0; pass one (model.generate('a cat'), or fastdiff txt2img PROMPT)"
    assert in_our_words(text) == "num_inference_steps must be 1, got 0; pass one"
    text = "the sides are 3 x 4 (width x height), or set fit (--fit) to crop"
    assert in_our_words(text) == "the sides are 3 x 4 (width x height), or set fit to crop"


# --- uploads ------------------------------------------------------------------------------------


def decoded(data: bytes, **limits: Any) -> Image.Image:
    async def decode() -> Image.Image:
        return await Uploads(Limits(**limits)).decode(data, "image")

    return asyncio.run(decode())


def refusal(data: bytes, **limits: Any) -> ApiError:
    with pytest.raises(ApiError) as found:
        decoded(data, **limits)
    return found.value


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        code = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + code

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))


def test_pixels_are_counted_before_they_are_decoded() -> None:
    error = refusal(bomb(50_000, 50_000))
    assert (error.status, error.code, error.param) == (413, "too_large", "image")
    assert refusal(bomb(1000, 1000)).code == "bad_image"  # claims few enough, but has none


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_the_memory_of_the_decoder_is_limited() -> None:
    picture = file_of(np.zeros((3000, 3000, 3), np.uint8))  # 27 MB, three times at the end
    assert decoded(picture, pixels=10**7, decoder_mib=512).size == (3000, 3000)
    assert refusal(picture, pixels=10**7, decoder_mib=64).code == "bad_image"


def test_the_time_of_the_decoder_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "slow.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(uploads_module, "SCRIPT", script)
    monkeypatch.setattr(uploads_module, "DECODING_SECONDS", 0.2)
    begin = time.monotonic()
    assert refusal(b"x").code == "bad_image"
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    "printed", [b"RGB 2 2 1\n", b"RGB 9 9 1\nxx", b"P 1 1 1\nx", b"cos\nsystem\n(S'id'\ntR."]
)
def test_what_a_decoder_writes_is_not_trusted(
    printed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "liar.py"
    script.write_text(f"import sys; sys.stdin.buffer.read(); sys.stdout.buffer.write({printed!r})")
    monkeypatch.setattr(uploads_module, "SCRIPT", script)
    assert refusal(b"x").code == "bad_image"


@pytest.mark.parametrize("data", [b"", b"not an image", file_of(np.zeros((4, 4), np.uint8), "BMP")])
def test_what_cannot_be_decoded_is_not_quoted(data: bytes) -> None:
    error = refusal(data)
    assert error.message == "image cannot be decoded; send a PNG, JPEG or WebP"


def test_pictures_are_upright_and_masks_read_both_ways() -> None:
    """A picture with EXIF orientation 6 is turned; a mask is transparent, or white."""
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.fromarray(ramp).save(turned, "PNG", exif=exif)
    shape = np.zeros((16, 32, 4), np.uint8)
    shape[:, :16, 3] = 255  # opaque on the left: kept
    white = np.where(shape[:, :, 3] == 0, 255, 0).astype(np.uint8)

    async def read(image: bytes, mask: bytes) -> Any:
        return await Uploads(Limits()).pictures(
            Form({}, {"image": image, "mask": mask}), 1, None, None
        )

    image, by_alpha = asyncio.run(read(file_of(ramp), file_of(shape)))
    _, by_white = asyncio.run(read(file_of(ramp), file_of(white)))
    assert np.allclose(image[0].numpy(), ramp / 127.5 - 1, atol=1e-6)
    assert np.array_equal(by_alpha[0].numpy(), white / 255)
    assert np.array_equal(by_white[0].numpy(), white / 255)
    opaque = np.dstack([white, white, white, np.full_like(white, 255)])
    _, by_colour = asyncio.run(read(file_of(ramp), file_of(opaque)))
    assert np.array_equal(by_colour[0].numpy(), white / 255), "no pixel is transparent"
    tall, _ = asyncio.run(
        Uploads(Limits()).pictures(Form({}, {"image": turned.getvalue()}), 1, None, None)
    )
    assert np.allclose(tall[0].numpy(), np.rot90(ramp, -1) / 127.5 - 1, atol=1e-6)
    with pytest.raises(ApiError, match="size of the image"):
        asyncio.run(read(file_of(ramp), file_of(white[:8])))
    with pytest.raises(ApiError, match="marks nothing"):
        asyncio.run(read(file_of(ramp), file_of(white * 0)))


def test_uploads_stay_off_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a file on the disk")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    data = bytes(3 * MIB)
    body, headers = form_of({"image": data, "prompt": "3"})
    form = asyncio.run(Uploads(Limits()).read(body, headers["content-type"]))
    assert (form.files, form.fields) == ({"image": data}, {"prompt": "3"})
    with pytest.raises(ApiError, match="not a whole form"):
        asyncio.run(Uploads(Limits()).read(body[:-9], headers["content-type"]))
    with pytest.raises(ApiError) as found:
        asyncio.run(Uploads(Limits(upload_mib=2)).read(body, headers["content-type"]))
    assert found.value.status == 413


def test_memory_for_uploads_is_leased() -> None:
    uploads = Uploads(Limits(uploads_mib=10))
    with uploads.lease() as first:
        first.resize(8 * MIB)
        with uploads.lease() as second, pytest.raises(ApiError) as found:
            second.resize(3 * MIB)
        assert (found.value.status, uploads.held) == (429, 8 * MIB)
        first.resize(2 * MIB)
        with uploads.lease() as second:
            second.resize(8 * MIB)
    assert uploads.held == 0


def test_files_and_fields_that_are_wrong(model: Model) -> None:
    service = service_of(model)
    picture = file_of(np.zeros((16, 16), np.uint8))
    for parts, message in (
        ({"prompt": "one"}, "image is missing"),
        ({"image": "text", "prompt": "one"}, "unknown field 'image'"),
        ({"image": picture, "image[]": picture}, "occurs twice"),
        ({"image": picture, "n": "two"}, "n: expected int"),
        ({"image": picture, "guidance_scale": "x"}, "expected a number"),
        ({"image": picture, "guidance_scale": "nan"}, "not a finite number"),
        ({"picture": picture}, "unknown file 'picture'"),
    ):
        body, headers = form_of(parts)  # type: ignore[arg-type]
        answer = answered(service, "/v1/images/edits", body, content_type=headers["content-type"])
        assert (answer.status, message in answer.json["error"]["message"]) == (400, True), message
    assert (service.open, service.uploads.held) == (0, 0)


# --- connections --------------------------------------------------------------------------------


def post(server: Running, body: bytes) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("POST", GENERATIONS, body, JSON)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def begin(server: Running, body: bytes) -> socket.socket:
    """Send a request, and wait until its images are in slots."""
    client = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: value(server, "images_running") > 0)
    return client


def value(server: Running, name: str, **labels: str) -> float:
    found = server.service.metrics.registry.get_sample_value(f"fastdiff_{name}", labels)
    return 0.0 if found is None else float(found)


def until(holds: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_hangs_up_frees_its_slots(model: Model) -> None:
    with running(service_of(model)) as server:
        begin(server, LONG).close()
        until(lambda: value(server, "images_running") == 0)
        until(lambda: server.service.open == 0)
        assert value(server, "dropped_total", reason="cancelled") == 1
        assert value(server, "images_total") == 0
        assert value(server, "requests_total", route="image_generation", status="499") == 1


def test_draining_finishes_what_runs_and_refuses_what_comes(model: Model) -> None:
    with running(service_of(model)) as server:
        client = begin(server, LONG)
        server.server.handle_exit(signal.SIGTERM, None)
        status, headers, body = post(server, BODY)
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(body)["error"]["code"] == "unavailable"
        text = b""
        while part := client.recv(2**16):
            text += part
        client.close()
    assert text.startswith(b"HTTP/1.1 200")
    assert b"b64_json" in text


def test_open_requests_have_a_limit(model: Model) -> None:
    with running(service_of(model, requests=1)) as server:
        with begin(server, LONG):
            status, headers, body = post(server, BODY)
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["code"] == "too_many_requests"
        until(lambda: server.service.open == 0)
        assert post(server, BODY)[0] == 200


async def talkative(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(99):  # of MiB
        await send({"type": "http.response.body", "body": bytes(MIB), "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


HALF = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nab"


@pytest.mark.parametrize("sent", [b"", HALF[:9], HALF, HALF + b"cdefghi"])
def test_clients_that_do_not_go_on_are_closed(sent: bytes) -> None:
    """One that sends nothing, half of a head, or half of a body and never reads."""

    async def scenario() -> float:
        config = uvicorn.Config(
            talkative, http=protocol_class(0.3, 10), lifespan="off", log_config=None
        )
        server = uvicorn.Server(config)
        with bind("127.0.0.1", 0) as listener:
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            await asyncio.sleep(0.1)
            client = socket.create_connection(listener.getsockname())
            client.sendall(sent)
            start = time.monotonic()
            await asyncio.sleep(0.2)
            while server.server_state.connections:
                await asyncio.sleep(0.02)
                assert time.monotonic() - start < 30
            took = time.monotonic() - start
            client.close()
            server.should_exit = True
            await serving
            return took

    assert asyncio.run(scenario()) > 0.25
