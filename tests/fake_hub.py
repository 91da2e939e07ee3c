"""A server with the part of the Hugging Face hub's interface that downloads use."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789" * 4


@contextlib.contextmanager
def serve(models, cache, log=None):
    """Serve folders as models, and let huggingface_hub download from there to `cache`.

    `models` maps `owner/name` to a folder. Every model has the revisions main, v1, and COMMIT.
    Names of the files that are requested are appended to `log`.
    """
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self, is_head=False):
            status, headers, body = self.answer(unquote(urlsplit(self.path).path).strip("/"))
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if not is_head:
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET(is_head=True)

        def answer(self, path):
            parts = path.removeprefix("api/models/").split("/")
            repo = "/".join(parts[:2])
            if repo not in models:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            kind, revision, name = parts[2], parts[3], "/".join(parts[4:])
            if revision not in ("main", "v1", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            files = [path for path in sorted(models[repo].rglob("*")) if path.is_file()]
            names = [str(path.relative_to(models[repo])) for path in files]
            if kind == "revision":
                siblings = [{"rfilename": name} for name in names]
                found = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}
                return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
            if kind == "tree":
                found = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": name}
                    for name, path in zip(names, files, strict=True)
                ]
                return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
            if name not in names:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            if log is not None:
                log.append(name)
            body = (models[repo] / name).read_bytes()
            tag = hashlib.sha1(body).hexdigest()
            return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    patch = pytest.MonkeyPatch()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield
    finally:
        patch.undo()
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def no_network(cache):
    """Let huggingface_hub find what is in `cache`, and no server."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield
