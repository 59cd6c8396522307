"""Images from strangers: what is opened, and who is asked for it."""

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reroute_jax.engine.questions import FittedImage
from reroute_jax.errors import RerouteError
from reroute_jax.serving.chat_request import ImageUrl
from reroute_jax.serving.known_images import KnownImages
from reroute_jax.serving.pictures import decoded, image_file, with_images

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
HERE = frozenset({"127.0.0.1"})


def encoded(kind: str, image: Image.Image = IMAGE) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def picture(url: str, name: str, hosts: frozenset[str], most_bytes: int) -> Image.Image:
    return decoded(image_file(url, name, hosts, most_bytes), name)


def fitted(file: bytes, name: str) -> FittedImage:
    return FittedImage((1, 1), np.asarray(decoded(file, name)), Path())


@pytest.fixture(scope="module")
def host():
    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/elsewhere" else 200)
            self.send_header("Location", "http://localhost/b.png")
            self.end_headers()
            self.wfile.write(encoded("PNG"))

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_messages_get_their_images_in_place():
    url = ImageUrl(data_url(encoded("BMP")))
    messages = [("system", "be brief"), ("user", [url, "which?", url])]
    system, (role, (first, text, second)) = with_images(messages, frozenset(), 1000, fitted)
    assert (system, role, text) == (messages[0], "user", "which?")
    for image in (first, second):
        np.testing.assert_array_equal(image.pixels, np.asarray(IMAGE))


def test_a_host_that_is_allowed_is_asked(host):
    np.testing.assert_array_equal(np.asarray(picture(f"{host}/a.png", "image 1", HERE, 1000)), np.asarray(IMAGE))


@pytest.mark.parametrize(
    ("path", "most", "said"),
    [
        ("/elsewhere", 1000, r"image 1 cannot be fetched \(status 302\)"),
        ("/a.png", 100, "image 1 has more than 100 bytes"),
        ("/a b", 1000, r"image 1 cannot be fetched \(InvalidURL\)"),
    ],
    ids=["redirect", "size", "URL"],
)
def test_what_is_not_fetched(host, path, most, said):
    with pytest.raises(RerouteError, match=said):
        picture(host + path, "image 1", HERE, most)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://localhost/a.png", "this server fetches those of 127.0.0.1: send a data URL"),
        ("http://127.0.0.1@localhost/a.png", "this server fetches those of 127.0.0.1"),
        ("http://[/a.png", "this server fetches those of 127.0.0.1"),
        ("file:///etc/passwd", "image 1 has no URL that is taken"),
        ("/etc/passwd", "image 1 has no URL that is taken"),
        ("data:image/png;base64,!", "image 1: a data URL that is not base64"),
        (data_url(b"text"), "image 1 cannot be decoded, expected PNG, JPEG, WEBP, GIF or BMP"),
        (data_url(b""), "image 1 cannot be decoded"),
        (data_url(encoded("PNG")[:90]), "image 1"),
        (data_url(encoded("EPS")), "image 1 cannot be decoded, expected PNG"),
    ],
    ids=["host", "user", "no host", "file", "path", "digits", "text", "nothing", "half", "EPS"],
)
def test_what_is_refused(url, said):
    with pytest.raises(RerouteError, match=said):
        picture(url, "image 1", HERE, 1000)


def test_images_that_come_again_are_opened_and_resized_once():
    """Those that were asked for last, in whatever messages; room is for two."""
    made = []

    def fit(image):
        made.append(image.getpixel((0, 0))[0])
        return FittedImage((1, 1), np.asarray(image), Path())

    files = {red: encoded("BMP", Image.new("RGB", (4, 2), (red, 0, 0))) for red in (1, 2, 3)}
    images = KnownImages(fit, max_bytes=2 * 4 * 2 * 3)
    first = images(files[1], "image 1")
    assert images(files[2], "image 2") is not first and images(files[1], "image 3") is first and made == [1, 2]
    images(files[3], "image 1")  # and 2 leaves
    assert images(files[1], "image 1") is first and made == [1, 2, 3]
    images(files[2], "image 1")
    assert made == [1, 2, 3, 2]
    with pytest.raises(RerouteError, match="image 7 cannot be decoded"):
        images(b"text", "image 7")
    none_kept = KnownImages(fit, max_bytes=0)
    assert none_kept(files[1], "image 1") is not none_kept(files[1], "image 1")
