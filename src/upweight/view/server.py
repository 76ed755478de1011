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
from typing import Any

from upweight.errors import SpecError, UpweightError, message
from upweight.report.check import Comparison
from upweight.report.page import subsets_of, words_of
from upweight.report.rendering import as_json, render_page
from upweight.scores import Scores
from upweight.view.answers import MOST_DROPPED, PER_PAGE, Answers, wanted

HOST = "127.0.0.1"
"""Nobody else's machine can ask."""

HOSTS = ["127.0.0.1", "localhost"]
"""Names under which a browser may ask; a site that points its own name here may not."""

STARTS_WITHIN_S = 10.0


def application(
    answers: Answers,
    token: str,
    title: str | None = None,
    comparison: Comparison | None = None,
    command: str | None = None,
) -> Any:
    """The view as an ASGI application.

    Args:
        answers: What is asked.
        token: What an address must carry as `?token=`.
        title: What the page is about.
        comparison: What `fitted.check(…)` found.
        command: What makes the scores again.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    words = words_of(answers.scores, (), comparison, answers.meta["kind"], title, command)
    meta = answers.meta | {
        "comparison": subsets_of(comparison),
        "caution": words["trust"].caution,
    }
    source = (resources.files("upweight.view") / "served.js").read_text(encoding="utf-8")
    page = render_page(meta, words, {}, source, connects=True)
    headers = {
        "Cache-Control": "private, max-age=3600",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }

    def guarded(answer: Callable[[Request], Response]) -> Callable[[Request], Any]:
        async def ask(request: Request) -> Response:
            given = request.query_params.get("token", "")
            if not secrets.compare_digest(given.encode(), token.encode()):
                text = "Open the address that `upweight view` printed: it carries a token."
                return PlainTextResponse(text, 403, headers={"Cache-Control": "no-store"})
            try:
                response = await run_in_threadpool(answer, request)
            except UpweightError as error:
                return PlainTextResponse(str(error), 400)
            except (KeyError, IndexError):
                return PlainTextResponse("There is no such thing here.", 404)
            for name, value in headers.items():
                response.headers.setdefault(name, value)  # an answer may be stricter
            return response

        return ask

    def start(request: Request) -> Response:
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    def number(request: Request, name: str, below: int) -> int:
        try:
            (place,) = wanted(request.path_params[name], 1, below)
        except (SpecError, ValueError) as error:
            raise IndexError(name) from error
        return place

    def told(found: Any) -> Response:
        # Not JSONResponse: it cannot encode half an emoji, which texts that were cut end in.
        return Response(as_json(found), media_type="application/json")

    def begin(request: Request, below: int) -> int:
        (first,) = wanted(request.query_params.get("start", "0"), 1, max(1, below)) or [0]
        return first

    def query(request: Request) -> Response:
        return told(answers.query(number(request, "q", answers.q)))

    def ranking(request: Request) -> Response:
        side = request.path_params["side"]
        if side not in ("raised", "lowered"):
            raise KeyError(side)
        q = number(request, "q", answers.q)
        return told(answers.ranking(q, side, begin(request, answers.n)))

    def some(request: Request) -> Response:
        ids = wanted(request.query_params.get("ids"), 20 * PER_PAGE, answers.n)
        if not ids:
            raise KeyError("ids")
        return told(answers.examples(ids))

    def drop(request: Request) -> Response:
        ids = wanted(request.query_params.get("ids"), MOST_DROPPED, answers.n)
        return told(answers.drop(ids))

    def training(request: Request) -> Response:
        return told(answers.training)

    def browse(request: Request) -> Response:
        return told(answers.page(request.path_params["order"], begin(request, answers.n)))

    def picture(request: Request) -> Response:
        role = request.path_params["role"]
        below = {"train": answers.n, "query": answers.q}[role]
        place = number(request, "place", below)
        return Response(answers.picture(role, place), media_type="image/png")

    routes = [
        Route("/", guarded(start)),
        Route("/query/{q}", guarded(query)),
        Route("/ranking/{q}/{side:str}", guarded(ranking)),
        Route("/examples", guarded(some)),
        Route("/drop", guarded(drop)),
        Route("/training", guarded(training)),
        Route("/browse/{order:str}", guarded(browse)),
        Route("/picture/{role:str}/{place}", guarded(picture)),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts])


class Server:
    """A view being served in a thread of this process, until it is closed.

    Args:
        answers: What is asked.
        port: Where; 0: any that is free.
        title, comparison, command: As for `upweight.report.html`.

    Raises:
        SpecError: The port is taken, or starlette and uvicorn are not installed.
    """

    def __init__(
        self,
        answers: Answers,
        port: int = 0,
        title: str | None = None,
        comparison: Comparison | None = None,
        command: str | None = None,
    ) -> None:
        try:
            import uvicorn
        except ImportError as error:
            raise SpecError(
                message(
                    "A view is served by starlette and uvicorn.",
                    f"{error}.",
                    "an installation without the extra.",
                    "pip install 'upweight[view]', or write a report instead.",
                )
            ) from error
        token = secrets.token_urlsafe(24)
        config = uvicorn.Config(
            application(answers, token, title, comparison, command),
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
                message(
                    "The port must be free.",
                    f"port {port} on {HOST}.",
                    "another view, or another program.",
                    "choose another port, or 0 for any that is free.",
                )
            )
        (found,) = {s.getsockname()[1] for server in self._server.servers for s in server.sockets}
        self.address = f"http://{HOST}:{found}/?token={token}"

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):  # how uvicorn says that the port is taken
            self._server.run()

    def __enter__(self) -> "Server":
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


def serve(
    scores: Scores,
    train: Any = None,
    queries: Any = None,
    *,
    keep: Path | None = None,
    port: int = 0,
    title: str | None = None,
    comparison: Comparison | None = None,
    command: str | None = None,
    open_browser: bool = False,
    told: Callable[[str], None] = print,
    **shown: Any,
) -> None:
    """Serve scores to this machine's browser until Ctrl-C.

    Args:
        scores: From `opened(folder)`; attached to a live context, also the measurement and the
            prediction of each query are shown.
        train: The training data; without them examples are numbers.
        queries: The queries.
        keep: Where totals may be kept for the next time: `keeping(folder)`.
        port: Where; 0: any that is free.
        title: What the page is about.
        comparison: What `fitted.check(…)` found.
        command: What makes the scores again.
        open_browser: Whether to open the address in the browser.
        told: Takes the address, to print it.
        shown: As for `Answers`.

    Raises:
        UpweightError: See `Answers` and `Server`.
    """
    answers = Answers(scores, train, queries, keep=keep, **shown)
    with Server(answers, port, title, comparison, command) as server:
        told(server.address)
        with contextlib.ExitStack() as opened:
            if open_browser:
                webbrowser.open(opened.enter_context(_forwarding(server.address)))
            try:
                server.wait()
            except KeyboardInterrupt:
                told("stopped")


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
