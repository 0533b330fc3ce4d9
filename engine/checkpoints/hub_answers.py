"""What a hub may answer.  Whoever serves it: names stay in the cache folder, and no answer goes on for ever.

The client makes files of names that the hub sends (commits, etags, paths), reads bodies to their end and waits as long
as it is told.  `guard_client` has every answer checked before the client sees it.
"""

import functools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UserError

if TYPE_CHECKING:
    import httpx

LARGEST_ANSWER, LARGEST_COMPRESSED = 32_000_000, 500_000
"""Bytes of an answer that is no file: as it is, and where it is compressed, which unpacks to a thousand times as much
at most."""

MOST_PAGES = 100
"""Of one listing; a page has a thousand files."""

MOST_REDIRECTS = 10
"""One after another, within a host: older clients follow them for ever."""

LONGEST_WAIT = 300.0
"""Seconds that a hub may ask to be left alone for."""

SLOWEST, PATIENCE = 1000.0, 60.0
"""Bytes per second at least, over so many seconds."""

_guarding = threading.Lock()
_redirects = threading.local()

_COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_ETAG = re.compile(r'(W/)?"?[0-9A-Za-z][0-9A-Za-z._:+=-]{0,127}"?')
_REVISION = re.compile(r"(?!/)(?!.*(\.\.|//|/\.))[\w./+=@-]{1,200}(?<!/)(?<!\.lock)")
_HASH_FIELDS = ("sha", "oid", "blobId", "sha256", "xetHash", "targetCommit")
_PATH_FIELDS = ("path", "rfilename")


class DistrustedAnswer(UserError):
    """The hub's answer is not one that a hub gives."""


def is_commit(name: str) -> bool:
    return _COMMIT.fullmatch(name) is not None


def require_revision(name: str) -> None:
    """Raise `UserError` for what cannot be a revision, and what would be a path out of the client's cache."""
    if not _REVISION.fullmatch(name):
        raise UserError(f"--checkpoints {name!r}: no branch, tag or commit can have that name")


def guard_client() -> None:
    """From now on the client of the hub has every answer checked; calling it again changes nothing.

    Whatever other client factory this process has set goes on to make the clients.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http  # which factory is set is told nowhere else

    with _guarding:  # setting a factory closes the client that others use
        current: Callable[[], httpx.Client] = _http._GLOBAL_CLIENT_FACTORY
        if not isinstance(current, functools.partial) or current.func is not _guarded:
            set_client_factory(functools.partial(_guarded, current))


def _guarded(factory: "Callable[[], httpx.Client]") -> "httpx.Client":
    client = factory()
    hooks = client.event_hooks
    pages: Counter[str] = Counter()
    check = functools.partial(_check, pages=pages)
    client.event_hooks = {
        "request": [*hooks["request"], _ask_for_plain],
        "response": [check, *hooks["response"]],
    }
    return client


def _ask_for_plain(request: "httpx.Request") -> None:
    """Listings are not to be compressed: nobody knows beforehand what they unpack to."""
    if _is_listing(request):
        request.headers["Accept-Encoding"] = "identity"


def _check(response: "httpx.Response", pages: Counter[str]) -> None:
    """Raise `DistrustedAnswer` for an answer that must not reach the client, before its body is read."""
    _check_wait(response)
    _check_headers(response)
    _check_redirects(response)
    bounded = _bounded_stream(response)
    response.stream = bounded
    if _is_listing(response.request) and response.is_success:
        _check_pages(response, pages)
        response.read()
        try:
            listing = json.loads(response.content)
        except (ValueError, RecursionError):
            return  # the client says that it is no JSON
        _check_names(response, listing)


def _check_wait(response: "httpx.Response") -> None:
    after = response.headers.get("Retry-After", "").strip()
    limits = re.findall(r";\s*t\s*=\s*([0-9]+)", response.headers.get("ratelimit", ""))
    waits = [number for number in (after, *limits) if number.isdecimal()]
    if any(len(number) > 9 or int(number) > LONGEST_WAIT for number in waits):
        raise DistrustedAnswer(
            f"{_place(response)} (status {response.status_code}) wants {max(waits, key=len)} s of waiting; "
            "run it again then, or run `hf auth login` for a higher limit"
        )


def _check_headers(response: "httpx.Response") -> None:
    """Those that the client makes names or further requests of."""
    headers = response.headers
    hashes = [headers[name] for name in ("X-Repo-Commit", "X-Xet-Hash") if name in headers]
    etags = [headers[name] for name in ("X-Linked-Etag", "ETag") if name in headers and _names_a_file(response)]
    for value in [hash for hash in hashes if not is_commit(hash)] + [e for e in etags if not _ETAG.fullmatch(e)]:
        raise _distrusted(response, f"the name {value!r}")
    if response.url.scheme == "https" and headers.get("Location", "").startswith("http:"):
        raise _distrusted(response, "a redirect to an unencrypted address")


def _check_redirects(response: "httpx.Response") -> None:
    """A thread follows one redirect after another, so that those which nothing else comes between make a chain."""
    within_host = response.is_redirect and response.headers.get("Location", "").startswith("/")
    _redirects.in_a_row = getattr(_redirects, "in_a_row", 0) + 1 if within_host else 0
    if _redirects.in_a_row > MOST_REDIRECTS:
        _redirects.in_a_row = 0
        raise _distrusted(response, f"more than {MOST_REDIRECTS} redirects in a row")


def _check_pages(response: "httpx.Response", pages: Counter[str]) -> None:
    path = response.request.url.path
    pages[path] += 1
    if "next" not in response.links:
        del pages[path]
    elif pages[path] > MOST_PAGES:
        del pages[path]
        raise _distrusted(response, f"more than {MOST_PAGES} pages of a listing")


def _check_names(response: "httpx.Response", listing: Any) -> None:
    """Every hash in a listing is one, and every path stays below the folder that it is taken from."""
    pending = [listing]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            for name in _HASH_FIELDS:
                if value.get(name) is not None and not (isinstance(value[name], str) and is_commit(value[name])):
                    raise _distrusted(response, f"the {name} {value[name]!r}")
            for name in _PATH_FIELDS:
                if value.get(name) is not None and not _stays_inside(value[name]):
                    raise _distrusted(response, f"the file name {value[name]!r}")


def _stays_inside(path: Any) -> bool:
    return isinstance(path, str) and "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def _bounded_stream(response: "httpx.Response") -> "httpx.SyncByteStream":
    """The response's body, which raises `DistrustedAnswer` where it is too long for a listing, or too slow."""
    import httpx

    compressed = response.headers.get("Content-Encoding", "identity").lower() != "identity"
    most = (LARGEST_COMPRESSED if compressed else LARGEST_ANSWER) if _is_listing(response.request) else None
    stream = response.stream
    assert isinstance(stream, httpx.SyncByteStream), "the client is a synchronous one"
    body: httpx.SyncByteStream = stream

    class Bounded(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            total, since, window = 0, time.monotonic(), 0
            for part in body:
                total, window = total + len(part), window + len(part)
                if most is not None and total > most:
                    raise _distrusted(response, f"more than {most:,} bytes")
                if (seconds := time.monotonic() - since) > PATIENCE:
                    if window < SLOWEST * seconds:
                        raise DistrustedAnswer(
                            f"{_place(response)} sent {window:,} bytes in {seconds:.0f} s; run it again later, "
                            "files that are complete are kept"
                        )
                    since, window = time.monotonic(), 0
                yield part

        def close(self) -> None:
            body.close()

    return Bounded()


def _is_listing(request: "httpx.Request") -> bool:
    return "/api/" in request.url.path and "/resolve/" not in request.url.path


def _names_a_file(response: "httpx.Response") -> bool:
    """Whether the client calls a file after the answer's etag; what other servers call theirs is no matter."""
    return response.request.method == "HEAD" or "X-Linked-Etag" in response.headers


def _place(response: "httpx.Response") -> str:
    url = response.request.url
    return f"{url.scheme}://{url.netloc.decode()}{url.path}"


def _distrusted(response: "httpx.Response", what: str) -> DistrustedAnswer:
    return DistrustedAnswer(
        f"{_place(response)} answers with {what[:200]}, which no hub does; check HF_ENDPOINT and the network"
    )
