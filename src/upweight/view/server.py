"""The view over HTTP: starlette and uvicorn on the loopback interface, a token in the address.

Every address without the right token is refused. Only GET is answered; addresses name queries,
examples and orders by number or by a fixed word, never a file.
"""

import contextlib
import html
import secrets
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Self

from upweight._typing import Folder
from upweight.effects import Effects
from upweight.errors import MissingPackage, SpecError, UpweightError
from upweight.report.answers import SIDES, Answers
from upweight.report.display import Display
from upweight.report.rendering import as_json, render_page
from upweight.report.sprite import geometry, sprite
from upweight.report.words import words_of
from upweight.scores import Scores
from upweight.view.totals import keeping_totals

HOST = "127.0.0.1"
"""Nobody else's machine can ask."""

HOSTS = ["127.0.0.1", "localhost"]
"""Names under which a browser may ask; a site that points its own name here may not."""

STARTS_WITHIN_S = 10.0

MOST_DROPPED = 1000
"""Examples that may be dropped together: each is read from as many places as there are queries."""

MOST_EXAMPLES = 240
"""Examples that are described at once."""

BROWSED = 24
"""Examples of one page of all of them."""

LONGEST_INDEX = 18
"""Digits of an index."""


def application(
    answers: Answers, token: str, command: str | None = None, outcomes: Any = ()
) -> Any:
    """The view as an ASGI application, of which an address must carry `?token=`."""
    from starlette.requests import Request
    from starlette.responses import Response

    words = words_of(answers, command, outcomes)
    pictured = {"train": answers.some.images, "query": answers.queries.images}
    meta = answers.meta | {
        "removed": answers.examples(answers.evidence.removed),
        "orders": answers.orders,
        "sprites": {
            # Each tile is a sheet of its own.
            role: geometry([sprite(images[:1], *answers.range)]) | {"tiles": 1, "sheets": None}
            for role, images in pictured.items()
            if images is not None and answers.range is not None
        },
        **words["trust"].data,
    }
    source = (resources.files("upweight.view") / "served.js").read_text(encoding="utf-8")
    page = render_page(meta, words, {}, source, connects=True)

    def number(request: Request, name: str, below: int) -> int:
        try:
            (place,) = wanted(request.path_params[name], 1, below)
        except (SpecError, ValueError) as error:
            raise IndexError(name) from error
        return place

    def begin(request: Request) -> int:
        (first,) = wanted(request.query_params.get("start", "0"), 1, answers.n) or [0]
        return first

    def ids(request: Request, most: int) -> list[int]:
        return wanted(request.query_params.get("ids"), most, answers.n)

    def examples(request: Request) -> Any:
        if not (some := ids(request, MOST_EXAMPLES)):
            raise KeyError("ids")
        return answers.examples(some)

    def query(request: Request) -> dict[str, Any]:
        found = answers.query(number(request, "q", answers.q))
        listed = [i for side in SIDES for i in found[side]["ids"]]
        return found | {"examples": answers.examples(listed)}

    def ranking(request: Request) -> dict[str, Any]:
        side = request.path_params["side"]
        if side not in SIDES:
            raise KeyError(side)
        found = answers.ranking(number(request, "q", answers.q), side, begin(request))
        return found | {"examples": answers.examples(found["ids"])}

    def picture(request: Request) -> Response:
        role = request.path_params["role"]
        place = number(request, "place", {"train": answers.n, "query": answers.q}[role])
        return Response(answers.picture(role, place), media_type="image/png")

    asked: dict[str, Callable[[Request], Any]] = {
        "/query/{q}": query,
        "/ranking/{q}/{side:str}": ranking,
        "/examples": examples,
        "/drop": lambda request: answers.drop(ids(request, MOST_DROPPED)),
        "/training": lambda _: answers.training,
        "/browse/{order:str}": lambda request: answers.browse(
            request.path_params["order"], begin(request), BROWSED
        ),
        "/picture/{role:str}/{place}": picture,
    }

    return answering(page, asked, token)


def answering(page: str, asked: dict[str, Callable[[Any], Any]], token: str) -> Any:
    """An ASGI application: a page, and what it asks for by GET, for who has the token.

    Args:
        page: At "/".
        asked: From a path to what answers a request: a response, or what becomes JSON. It may raise
            `UpweightError`, or `KeyError` and `IndexError` where there is no such thing.
        token: That every address must carry as `?token=`.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    never = {"Cache-Control": "no-store"}
    asked = {"/": lambda _: HTMLResponse(page, headers=never), **asked}
    headers = {
        "Cache-Control": "private, max-age=3600",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }

    def answered(path: str, request: Request) -> Response:
        try:
            found = asked[path](request)
        except UpweightError as error:
            return PlainTextResponse(str(error), 400)
        except (KeyError, IndexError):
            return PlainTextResponse("There is no such thing here.", 404)
        if not isinstance(found, Response):
            # Not JSONResponse: it cannot encode half an emoji, which texts that were cut end in.
            found = Response(as_json(found), media_type="application/json")
        for name, value in headers.items():
            found.headers.setdefault(name, value)  # an answer may be stricter
        return found

    def guarded(path: str) -> Callable[[Request], Any]:
        async def ask(request: Request) -> Response:
            given = request.query_params.get("token", "")
            if not secrets.compare_digest(given.encode(), token.encode()):
                text = "Open the address that `upweight view` printed: it carries a token."
                return PlainTextResponse(text, 403, headers={"Cache-Control": "no-store"})
            return await run_in_threadpool(answered, path, request)

        return ask

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    routes = [Route(path, guarded(path)) for path in asked]
    return Starlette(routes=routes, middleware=[hosts])


class Loopback:
    """An application being served in a thread of this process, until it is closed.

    Args:
        application: From the token that its addresses carry to what is served.
        port: Where; 0: any that is free.

    Raises:
        SpecError: The port is taken.
        MissingPackage: starlette or uvicorn is not installed.
    """

    def __init__(self, application: Callable[[str], Any], port: int = 0) -> None:
        try:
            import starlette  # noqa: F401  which the application needs
            import uvicorn
        except ImportError as error:
            raise MissingPackage(
                "A view is served by starlette and uvicorn.",
                f"{error}.",
                "an installation without them: upweight itself does not need them.",
                "pip install 'upweight[view]', or write a report instead.",
            ) from error
        token = secrets.token_urlsafe(24)
        config = uvicorn.Config(
            application(token),
            host=HOST,
            port=port,
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        until = time.monotonic() + STARTS_WITHIN_S
        while not self._server.started and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        if not self._server.started:
            raise SpecError(
                "The port must be free.",
                f"port {port} on {HOST}.",
                "another view, or another program.",
                "choose another port, or 0 for any that is free.",
            )
        (found,) = {s.getsockname()[1] for server in self._server.servers for s in server.sockets}
        self.address = f"http://{HOST}:{found}/?token={token}"

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):  # how uvicorn says that the port is taken
            self._server.run()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Until somebody interrupts."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(STARTS_WITHIN_S)


class Server(Loopback):
    """A view of scores.

    Args:
        scores: From `Scores.open(folder)`, or in memory; attached to a live context, also the
            measurement and the prediction of each query are shown.
        display, evidence, removal, outcomes, command: As for `upweight.report.html`. Without data
            examples are numbers. A live model is asked for nothing about all of the training data.
        keep: The folder of the scores, where totals may be kept for the next time.
        port: Where; 0: any that is free.

    Raises:
        SpecError: The port is taken.
        MissingPackage: starlette or uvicorn is not installed.
        UpweightError: See `Answers`.
    """

    def __init__(
        self,
        scores: Scores,
        display: Display = Display(),  # noqa: B008  frozen
        *,
        evidence: Any = (),
        removal: Effects | None = None,
        outcomes: Any = (),
        command: str | None = None,
        keep: Folder | None = None,
        port: int = 0,
    ) -> None:
        summed = keeping_totals(keep)
        answers = Answers(scores, display, evidence, removal, ask=False, summed=summed)
        super().__init__(lambda token: application(answers, token, command, outcomes), port)


def serve(
    scores: Scores,
    display: Display = Display(),  # noqa: B008  frozen
    *,
    open_browser: bool = False,
    told: Callable[[str], None] = print,
    **served: Any,
) -> None:
    """Serve scores to this machine's browser until Ctrl-C.

    Arguments are those of `Server`; `told` takes the address, to print it.

    Raises:
        UpweightError: See `Server`.
    """
    with Server(scores, display, **served) as server:
        until_interrupted(server, open_browser, told)


def until_interrupted(server: Loopback, open_browser: bool, told: Callable[[str], None]) -> None:
    """Tell the address of a server, and wait for Ctrl-C."""
    told(server.address)
    with contextlib.ExitStack() as opened:
        if open_browser:
            webbrowser.open(opened.enter_context(_forwarding(server.address)))
        try:
            server.wait()
        except KeyboardInterrupt:
            told("stopped")


def wanted(text: str | None, most: int, below: int) -> list[int]:
    """Distinct indices 0 … below − 1 of an address, as "3,17".

    Raises:
        SpecError: It names others, or too many.
    """
    parts = [part for part in (text or "").split(",") if part]
    # Of so few digits as any index has: Python refuses to read thousands of them.
    found = [int(part) for part in parts if part.isdecimal() and len(part) <= LONGEST_INDEX]
    if not len(parts) == len(found) == len(set(found)) <= most or any(i >= below for i in found):
        raise SpecError(
            f"At most {most} distinct indices below {below}.",
            f"{(text or '')[:60]!r}.",
            "an address written by hand.",
            "go by the page.",
        )
    return found


@contextlib.contextmanager
def _forwarding(address: str) -> Iterator[str]:
    """The address of a file that leads a browser on to another address.

    Every user of a machine can read the command lines of its processes, a browser's too: the token
    must not be on one. The file is in a folder that its owner alone can read.
    """
    with tempfile.TemporaryDirectory(prefix="upweight-") as folder:  # made with mode 700
        file = Path(folder) / "view.html"
        leading = f'<meta http-equiv="refresh" content="0; url={html.escape(address)}">'
        file.write_text(f"<!doctype html><title>upweight view</title>{leading}", encoding="utf-8")
        yield file.as_uri()
