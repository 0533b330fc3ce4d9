"""Whatever a hub answers, a command ends in one line, and nothing is written outside the client's cache.

The hub is a loopback one that lies, asked by the real huggingface_hub client.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from headlapse.__main__ import main
from headlapse.engine.checkpoints import hub_answers
from tests.hub_server import HubServer, Lie
from tests.models import save, tiny, tiny_tokenizer
from tests.test_sources import without_waiting

pytestmark = pytest.mark.thorough

REPO = "owner/series"
WEIGHTS = "model.safetensors"
OUTSIDE = "../../../../outside"
"""From a repository's folder in the client's cache it leads out of the cache."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("model")
    save(tiny("neox-parallel"), directory, tokenizer=tiny_tokenizer())
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({REPO: {"main": files, "step8": files}}) as server:
        server.use_here(monkeypatch, tmp_path / "deep" / "er" / "home")
        without_waiting(monkeypatch)
        monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "stores"))
        monkeypatch.setattr(hub_answers, "PATIENCE", 0.5)
        yield server
    huggingface_hub.close_session()


def flipped(content: bytes) -> bytes:
    at = len(content) * 2 // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def in_listing(change: Callable[[dict[str, Any]], object], word: str = "") -> Callable[[HubServer], None]:
    """Change what is listed of a revision; only at paths with `word` in them."""

    def lie(hub: HubServer) -> None:
        def rewrite(path: str, listing: Any) -> Any:
            if isinstance(listing, dict) and word in path:
                change(listing)
            return listing

        hub.rewrite = rewrite

    return lie


def sent(body: bytes) -> Callable[[HubServer], None]:
    """Send these bytes in place of every listing."""

    def lie(hub: HubServer) -> None:
        hub.rewrite = lambda _path, _listing: body

    return lie


def served(name: str, **fields: Any) -> Callable[[HubServer], None]:
    """Serve one file otherwise than it is listed."""

    def lie(hub: HubServer) -> None:
        hub.lies[name] = Lie(**fields)

    return lie


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[HubServer], None]:
    """Serve other bytes of a file than those that are listed."""

    def lie(hub: HubServer) -> None:
        content = hub.repos[REPO]["main"][name].content
        assert isinstance(content, bytes)
        hub.lies[name] = Lie(content=change(content))

    return lie


def gone(hub: HubServer) -> None:
    hub.gone = {"main", "step8"}


def told_to_wait(hub: HubServer) -> None:
    hub.status, hub.headers = 429, {"Retry-After": "86400"}


def told_to_wait_by_its_limits(hub: HubServer) -> None:
    hub.status, hub.headers = 429, {"ratelimit": '"api";r=0;t=' + "9" * 5000}


def size_of_weights(size: Any) -> Callable[[dict[str, Any]], None]:
    def change(listing: dict[str, Any]) -> None:
        for sibling in listing.get("siblings", ()):
            if sibling["rfilename"] == WEIGHTS:
                sibling["size"] = sibling["lfs"]["size"] = size

    return change


def index_naming(*shards: str) -> Callable[[HubServer], None]:
    def lie(hub: HubServer) -> None:
        index = json.dumps({"weight_map": dict(enumerate(shards))}).encode()
        content = {name: blob.content for name, blob in hub.repos[REPO]["main"].items() if name != WEIGHTS}
        hub.push(REPO, "main", {**content, "model.safetensors.index.json": index, "shard.safetensors": b""})

    return lie


WAYS: dict[str, tuple[Callable[[HubServer], None], str]] = {
    "weights-with-a-flipped-bit": (changed(WEIGHTS, flipped), "it is not what was published"),
    "config-with-a-flipped-bit": (changed("config.json", flipped), "it is not what was published"),
    "tokenizer-with-a-flipped-bit": (changed("tokenizer.json", flipped), "it is not what was published"),
    "weights-longer-than-listed": (changed(WEIGHTS, lambda content: content + b"more"), "should be of size"),
    "weights-shorter-than-listed": (changed(WEIGHTS, lambda content: content[:-1]), "should be of size"),
    "size-that-no-disk-holds": (in_listing(size_of_weights(10**17)), "make room, or set HF_HOME"),
    "size-below-zero": (in_listing(size_of_weights(-1)), "does not say how large"),
    "size-unsaid": (in_listing(size_of_weights(None)), "does not say how large"),
    "size-in-words": (in_listing(size_of_weights("big")), "does not answer"),
    "body-without-end": (served(WEIGHTS, endless=True), "sends more and more"),
    "config-without-end": (served("config.json", endless=True, only="GET"), "sends more and more"),
    "weights-byte-by-byte": (served(WEIGHTS, pause=0.01), "bytes in"),
    "etag-out-of-the-cache": (served(WEIGHTS, headers={"X-Linked-Etag": f'"{OUTSIDE}"'}), "answers with the name"),
    "plain-etag-out-of-the-cache": (served("config.json", headers={"ETag": f'"{OUTSIDE}"'}), "answers with the name"),
    "etag-that-is-absolute": (served("config.json", headers={"ETag": '"/outside"'}), "answers with the name"),
    "commit-out-of-the-cache": (served("config.json", headers={"X-Repo-Commit": OUTSIDE}), "answers with the name"),
    "listed-commit-out-of-the-cache": (in_listing(lambda listing: listing.update(sha=OUTSIDE)), "answers with the sha"),
    "listed-commit-that-is-no-text": (in_listing(lambda listing: listing.update(sha=[1])), "answers with the sha"),
    "file-name-out-of-the-cache": (
        in_listing(lambda listing: listing["siblings"].append({"rfilename": OUTSIDE})),
        "answers with the file name",
    ),
    "file-name-that-is-absolute": (
        in_listing(lambda listing: listing["siblings"].append({"rfilename": "/etc/passwd"})),
        "answers with the file name",
    ),
    "shard-out-of-the-cache": (index_naming(f"{OUTSIDE}.safetensors"), "which is no file beside it"),
    "shard-that-is-a-pattern": (index_naming("*"), "which is no file beside it"),
    "shard-with-a-nul": (index_naming("a\0b"), "which is no file beside it"),
    "redirect-to-a-file": (served(WEIGHTS, location="file:///etc/passwd"), "revision main"),
    "redirect-in-a-circle": (served(WEIGHTS, location=f"/{REPO}/resolve/main/{WEIGHTS}"), "10 redirects in a row"),
    "redirect-to-nowhere": (served(WEIGHTS, location="http://127.0.0.1:1/x", only="GET"), "broke off"),
    "revision-that-vanishes": (gone, "is gone from"),
    "told-to-wait-a-day": (told_to_wait, "wants 86400 s of waiting"),
    "told-to-wait-for-ever": (told_to_wait_by_its_limits, "s of waiting"),
    "listing-that-is-none": (sent(b"[]"), "does not answer"),
    "listing-of-a-hundred-megabytes": (sent(b"[" + b" " * 100_000_000 + b"]"), "more than 32,000,000 bytes"),
    "listing-of-brackets": (sent(b"[" * 1_000_000), "revision main"),
    "listing-without-files": (in_listing(lambda listing: listing.pop("siblings")), "is no checkpoint"),
    "listing-with-files-that-are-none": (in_listing(lambda listing: listing.update(siblings=[7])), "does not answer"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_lying_hub_is_refused_in_one_line(
    way: str, hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lie, complaint = WAYS[way]
    lie(hub)
    before = outside(tmp_path)
    assert main(["cache", "--model", REPO, "--trials", "2"]) in (1, 2)
    printed = capfd.readouterr()
    assert complaint in printed.err and printed.err.startswith("error: "), printed.err
    assert printed.err.count("\n") == 1 and not printed.out
    assert outside(tmp_path) == before
    assert not list((tmp_path / "stores").glob("*.zarr")), "nothing was believed"


def outside(tmp_path: Path) -> set[Path]:
    """Every file that is neither in the client's cache nor among the stores."""
    inside = (tmp_path / "deep" / "er" / "home" / "hub", tmp_path / "stores")
    return {path for path in tmp_path.rglob("*") if path.is_file() and not any(map(path.is_relative_to, inside))}


def test_an_honest_hub_is_believed(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--model", REPO, "--trials", "2"]) == 0
    assert capsys.readouterr().out.startswith("cached 1 checkpoint")


def test_branches_whose_names_are_paths_are_refused(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    def rewrite(path: str, listing: Any) -> Any:
        if path.endswith("/refs"):
            listing["branches"][0]["name"] = f"step1{OUTSIDE}"
        return listing

    hub.rewrite = rewrite
    assert main(["cache", "--model", REPO, "--checkpoints", "all"]) == 2
    assert "no branch, tag or commit can have that name" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["/step1", "step1//x", "a b", "x.lock", "-", "step1/"])
def test_a_label_that_no_revision_can_have_is_not_asked_for(
    word: str, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "--model", REPO, "--checkpoints", word]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not [path for _, path in hub.requests if "/step1" in path or "resolve" in path]


def test_a_compressed_listing_is_not_unpacked_beyond_its_bound(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = gzip.compress(b"[" + b" " * 20_000_000 + b"]", 1)
    hub.rewrite = lambda _path, _listing: bomb
    hub.listing_headers = {"Content-Encoding": "gzip"}
    monkeypatch.setattr(hub_answers, "LARGEST_COMPRESSED", len(bomb) - 1)
    assert main(["cache", "--model", REPO]) == 2
    assert f"more than {len(bomb) - 1:,} bytes" in capsys.readouterr().err


def test_a_listing_of_endless_pages_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by the client itself: only its newer versions list a repository in pages when they fetch it."""
    monkeypatch.setattr(hub_answers, "MOST_PAGES", 5)
    hub.listing_headers = {"Link": f'<{hub.url}/api/models/{REPO}/tree/main?cursor=x>; rel="next"'}
    hub_answers.guard_client()
    with pytest.raises(hub_answers.DistrustedAnswer, match="more than 5 pages of a listing"):
        list(huggingface_hub.HfApi(endpoint=hub.url).list_repo_tree(REPO))
