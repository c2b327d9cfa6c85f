"""Downloads from a real server on loopback: whole, interrupted and resumed, refused, wrong, forbidden."""

import functools
import hashlib
import http.server
import threading

import pytest
from arm_kvm.host.kernel import download
from arm_kvm.support.errors import DownloadFailed, Offline, WrongChecksum

DATA = bytes(range(256)) * 20_000
SHA = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves DATA with ranges; the first ``cut`` answers break off in the middle."""

    def __init__(self, state, *args):
        self.state = state
        super().__init__(*args)

    def do_GET(self):
        self.state["ranges"].append(self.headers.get("Range"))
        if self.path != "/linux.tar.xz":
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        cut = self.state["cut"] > 0
        self.state["cut"] -= 1
        self.wfile.write(DATA[start : start + 1_000_000] if cut else DATA[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    state = {"cut": 0, "ranges": []}
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, state))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{httpd.server_port}"
    yield state
    httpd.shutdown()
    httpd.server_close()


def test_fetched_checked_and_cached(own_cache, server):
    path = download.tarball(f"{server['url']}/linux.tar.xz", SHA)
    assert path.name == "linux.tar.xz" and path.read_bytes() == DATA
    assert download.tarball(f"{server['url']}/linux.tar.xz", SHA) == path
    assert len(server["ranges"]) == 1


def test_loopback_is_allowed_offline(own_cache, server, monkeypatch):
    monkeypatch.setenv("ARM_KVM_OFFLINE", "1")
    assert download.tarball(f"{server['url']}/linux.tar.xz", SHA).exists()


def test_goes_on_where_it_stopped(own_cache, server):
    server["cut"] = 1
    with pytest.raises(DownloadFailed, match="ended after 1000000 bytes"):
        download.tarball(f"{server['url']}/linux.tar.xz", SHA)
    assert download.tarball(f"{server['url']}/linux.tar.xz", SHA).read_bytes() == DATA
    assert server["ranges"] == [None, "bytes=1000000-"]


def test_wrong_checksum_says_both_and_keeps_nothing(own_cache, server):
    for _ in range(2):
        with pytest.raises(WrongChecksum, match=f"{SHA}.*{'0' * 64}"):
            download.tarball(f"{server['url']}/linux.tar.xz", "0" * 64)
    assert server["ranges"] == [None, None], "the wrong file is not resumed"


def test_missing_file_on_the_server(own_cache, server):
    with pytest.raises(DownloadFailed, match="404"):
        download.tarball(f"{server['url']}/other.tar.xz", SHA)


def test_no_server(own_cache, server):
    with pytest.raises(DownloadFailed, match="refused"):
        download.tarball("http://127.0.0.1:1/linux.tar.xz", SHA)


def test_offline_forbids_the_rest_of_the_world(own_cache, monkeypatch):
    monkeypatch.setenv("ARM_KVM_OFFLINE", "1")
    with pytest.raises(Offline, match="ARM_KVM_OFFLINE") as caught:
        download.tarball("https://example.invalid/linux.tar.xz", SHA)
    assert "--kernel PATH" in caught.value.remedy
