"""The live page: a server on the loopback interface that explains what is typed.

What is unusual here is what keeps other pages in the same browser, and other users of the machine, away from it:
- the address holds a random token, so nobody can guess it;
- the Host header must be the server's own (a foreign name that resolves to 127.0.0.1 is refused), and so must Origin;
- a request has a size limit and a time limit, and only so many may wait.
"""

import json
import secrets
import signal
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from minipref.data import Pair, to_pairs
from minipref.explain.attribution import explain
from minipref.explain.page import fill_template, page_data, pair_texts, to_json
from minipref.predictor import Judge
from minipref.runtime import InputError

EXAMPLES = (
    ("two plays", ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet around 1600.", "Charles Dickens wrote it.")),
    ("short or long", ("Name a fruit.", "An apple.",
                       "Of course! Many people enjoy the banana, which is yellow, sweet and rich in potassium.")),
    ("a wrong sum", ("What is 17 + 25?", "17 + 25 = 42.", "17 + 25 = 32.")),
    ("the same twice", ("Say hello.", "Hello!", "Hello!")),
)
MOST_BYTES = 1 << 20       # of a request
MOST_DISCARDED = 1 << 26   # of a body that is too large: at most this many bytes are read before the answer
MOST_WAITING = 8           # requests at once, the one that is computed included
SECONDS = 10               # without a byte, after which a connection is closed
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingHTTPServer):
    """Serves one model. `address` is what a browser opens. Port 0 is a free one."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, judge: Judge, name: str, pairs: Sequence[Pair] = (), first: Pair | None = None, *,
                 max_length: int = 128, layer: int = 0, head: int = 0, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.judge, self.name, self.pairs, self.max_length = judge, name, pairs, max_length
        self.token = secrets.token_urlsafe(16)
        self.hosts = {f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")}
        self.computing, self.waiting = threading.Lock(), threading.BoundedSemaphore(MOST_WAITING)
        examples = [("yours", pair_texts(first))] if first else []
        self.page = fill_template("minipref, live", layer, head, {
            "live": True, "rows": len(pairs), "examples": [*examples, *EXAMPLES]})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def explain(self, texts: Sequence[str]) -> dict:
        """The page's data of one pair. Errors: `InputError` for texts that are no pair."""
        with self.computing:                   # one at a time: torch uses all cores for each
            return page_data(explain(self.judge, *to_pairs([texts]), self.max_length, self.name))

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; a computation that has begun is finished."""
        before = {number: signal.signal(number, lambda *_: threading.Thread(target=self.shutdown).start())
                  for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.serve_forever(poll_interval=0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.computing.acquire()           # and never released: no thread may start another one


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS
    server_version, sys_version = "minipref", ""

    def do_GET(self) -> None:
        path = self._own_path()
        if path is None:
            return
        if path.path == "":
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path.path == "row":
            number = parse_qs(path.query).get("n", [""])[0]
            pairs = self.server.pairs
            if number.isdecimal() and len(number) < 10 and 1 <= int(number) <= len(pairs):
                self._answer(HTTPStatus.OK, to_json({"texts": pair_texts(pairs[int(number) - 1])}))
            else:
                self._refuse(HTTPStatus.NOT_FOUND, f"no such row; the file has {len(pairs):,}")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "nothing is here")

    def do_POST(self) -> None:
        path = self._own_path()
        if path is None:
            return
        body = self._body()
        if body is None:
            return
        if path.path != "explain":
            return self._refuse(HTTPStatus.NOT_FOUND, "nothing is here")
        if not self.server.waiting.acquire(blocking=False):
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once")
        try:
            texts = json.loads(body)
            if not (isinstance(texts, list) and len(texts) == 3 and all(isinstance(text, str) for text in texts)):
                raise ValueError
            answer = to_json(self.server.explain(texts))
        except InputError as problem:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(problem))
        except (ValueError, RecursionError):
            return self._refuse(HTTPStatus.BAD_REQUEST, "not a JSON list of three texts")
        except RuntimeError as problem:        # torch's, for example out of memory
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(problem).split("\n")[0])
        finally:
            self.server.waiting.release()
        self._answer(HTTPStatus.OK, answer)

    def _own_path(self):
        """The address within the server, split; None if the request is not from its own page, which is then refused."""
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        if self.headers.get_all("Host", []) != [host := self.headers.get("Host")] or host not in self.server.hosts or \
                origin not in (None, f"http://{host}") or site not in ("same-origin", "none"):
            return self._refuse(HTTPStatus.FORBIDDEN, "not from this server's own page")
        path = urlsplit(self.path)
        first, token, *rest = path.path.split("/", 2)
        if first or not rest or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return self._refuse(HTTPStatus.NOT_FOUND, "nothing is here")
        return path._replace(path=rest[0])

    def _body(self) -> bytes | None:
        """The request's body; None if it has none, or one that is too large, which is then refused."""
        length = self.headers.get("Content-Length", "")
        if not (length.isdecimal() and len(length) < 12) or "Transfer-Encoding" in self.headers:
            return self._refuse(HTTPStatus.LENGTH_REQUIRED, "a request without its length")
        if self.headers.get_content_type() != "application/json":      # what a form of another page cannot send
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not JSON")
        if int(length) <= MOST_BYTES:
            return self.rfile.read(int(length))
        left = min(int(length), MOST_DISCARDED)
        while left > 0 and (part := self.rfile.read(min(left, MOST_BYTES))):
            left -= len(part)
        return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MOST_BYTES:,} bytes of text")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._answer(status, to_json({"error": reason}))

    def _answer(self, status: HTTPStatus, text: str, kind: str = "application/json") -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:                        # the browser went away, or was silent for too long
            self.close_connection = True

    def log_message(self, *_) -> None:
        """Nothing is logged: the texts are the user's."""
