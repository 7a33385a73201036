"""A folder served as Google Cloud Storage over HTTP, for gcsfs, google-cloud-storage and tensorstore alike.

Objects appear whole, do not grow, and make their folders; a folder without objects is not there. Of the JSON API it has
what these libraries call: objects (read, in ranges, list, upload in one or several parts, copy, delete) and buckets.
"""

from __future__ import annotations

import contextlib
import email
import http.server
import json
import re
import threading
import urllib.parse
from pathlib import Path

import fsspec
from tensorboardX import record_writer

_TIME = "2026-01-01T00:00:00.000Z"
_lock = threading.Lock()  # uploads that compare generations


def _delete(path: Path) -> bool:
    # A name that only begins those of other objects is a folder here, and nothing there.
    if found := path.is_file():
        path.unlink()
    return found


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    generations: dict[Path, int]
    uploads: dict[str, tuple[Path, bytearray]]

    def log_message(self, *args):
        pass

    def _reply(self, code: int, content: bytes | dict = b"", **headers: str) -> None:
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        with contextlib.suppress(BrokenPipeError):  # of two questions at once, the first answer may be enough
            self.end_headers()
            self.wfile.write(content)

    def _parse(self) -> tuple[Path, str, dict[str, str]]:
        """(folder of the bucket, rest of the path behind it, query)."""
        url = urllib.parse.urlsplit(self.path)
        found = re.search(r"/b/([^/]+)(?:/o)?/?(.*)$", url.path)
        bucket, rest = found.groups() if found else ("", "")
        return self.root / bucket, rest, dict(urllib.parse.parse_qsl(url.query))

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _object(self, path: Path) -> dict[str, str]:
        bucket = path.relative_to(self.root).parts[0]
        name = str(path.relative_to(self.root / bucket))
        generation = str(self.generations.setdefault(path, 1))
        return {
            "kind": "storage#object", "name": name, "bucket": bucket, "id": name, "size": str(path.stat().st_size),
            "generation": generation, "metageneration": "1", "timeCreated": _TIME, "updated": _TIME,
        }  # fmt: skip

    def _store(self, path: Path, content: bytes, wanted: str | None = None) -> None:
        with _lock:
            if wanted is not None and int(wanted) != (self.generations.get(path, 1) if path.is_file() else 0):
                return self._reply(412)
            self.generations[path] = self.generations.get(path, 0) + 1
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self._reply(200, self._object(path))

    def do_GET(self):
        bucket, rest, query = self._parse()
        path = bucket / urllib.parse.unquote(rest)
        if not rest and "/o" in urllib.parse.urlsplit(self.path).path[-2:]:
            return self._reply(200, self._listing(bucket, query))
        if not rest:
            return self._reply(200, {"kind": "storage#bucket", "name": bucket.name, "location": "US"})
        if not path.is_file():
            return self._reply(404, {"error": {"code": 404, "message": "no such object"}})
        if query.get("alt") != "media":
            return self._reply(200, self._object(path))
        content = path.read_bytes()
        headers = {"x_goog_generation": self._object(path)["generation"]}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not found:
            return self._reply(200, content, **headers)
        first, last = found.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(len(content), int(last) + 1 if first and last else len(content))
        if start >= len(content):
            return self._reply(416)
        return self._reply(206, content[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(content)}", **headers)

    def _listing(self, bucket: Path, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, last = query.get("startOffset", ""), query.get("endOffset") or "\U0010ffff"
        items, prefixes = [], set()
        for path in sorted(bucket.rglob("*")):
            name = str(path.relative_to(bucket))
            if not path.is_file() or not name.startswith(prefix) or not first <= name < last:
                continue
            below = name[len(prefix) :]
            if delimiter and delimiter in below:
                prefixes.add(prefix + below.partition(delimiter)[0] + delimiter)
            else:
                items.append(self._object(path))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def do_POST(self):
        if self.path.startswith("/resume"):
            return self.do_PUT()
        bucket, rest, query = self._parse()
        content = self._body()
        if self.path.startswith("/batch"):
            return self._batch(content)
        if found := re.match(r"/storage/v1/b/([^/]+)/o/(.+)/(moveTo|rewriteTo)(?:/b/([^/]+))?/o/([^?]+)", self.path):
            bucket, name, verb, other, target = found.groups()
            source = self.root / bucket / urllib.parse.unquote(name)
            path = self.root / (other or bucket) / urllib.parse.unquote(target)
            if not source.is_file():
                return self._reply(404)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read_bytes())
            if verb == "moveTo":
                source.unlink()
            return self._reply(200, self._object(path) | {"done": True, "resource": self._object(path)})
        kind = query.get("uploadType")
        if kind == "media":
            return self._store(bucket / query["name"], content, query.get("ifGenerationMatch"))
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            about, data = email.message_from_bytes(head + content).get_payload()
            return self._store(bucket / json.loads(about.get_payload())["name"], data.get_payload(decode=True))
        name = query.get("name") or json.loads(content)["name"]
        key = str(len(self.uploads))
        self.uploads[key] = (bucket / name, bytearray())
        host = self.headers["Host"]
        return self._reply(200, Location=f"http://{host}/resume?upload_id={key}")

    def do_PUT(self):
        path, kept = self.uploads[dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))["upload_id"]]
        kept += self._body()
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._reply(308, Range=f"bytes=0-{len(kept) - 1}")
        return self._store(path, bytes(kept))

    def do_DELETE(self):
        bucket, rest, _ = self._parse()
        return self._reply(204 if _delete(bucket / urllib.parse.unquote(rest)) else 404)

    def _batch(self, content: bytes) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
        out = b""
        for part in email.message_from_bytes(head + content).get_payload():
            found = re.match(r"DELETE \S*/b/([^/]+)/o/(\S+)", part.get_payload())
            path = self.root / found[1] / urllib.parse.unquote(found[2])
            status = "204 No Content" if _delete(path) else "404 Not Found"
            number = part["Content-ID"].strip("<>")
            out += f"--x\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n".encode()
            out += f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n".encode()
        self._reply(200, out + b"--x--\r\n", Content_Type="multipart/mixed; boundary=x")


@contextlib.contextmanager
def buckets(root: Path, monkeypatch):
    """Makes the folders of `root` the buckets of gs:// for this process."""
    handler = type("Handler", (_Handler,), {"root": root, "generations": {}, "uploads": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs, google-cloud-storage
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # tensorstore
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask the bucket's kind over gRPC
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon", "use_listings_cache": False})
    # Collected when Python ends, a writer of events would upload once more, and wait two minutes for this server.
    record_writer.GCSRecordWriter.__del__ = lambda self: None
    try:
        yield
    finally:
        server.shutdown()
