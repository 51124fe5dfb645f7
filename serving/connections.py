"""A client's connection, with time limits where uvicorn has none, and a load shedder that can refuse requests.

The limits are for headers that never end or never stop coming, the rest of a body whose request is already answered,
and a reply that nobody reads: each holds a file descriptor and memory. A request whose body comes late is answered at
its own deadline.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import ClassVar

import httptools
import uvicorn.config
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving import metrics
from serving.errors import REFUSAL_SECONDS, ApiError, standalone
from serving.heads import UPGRADING, read_whole
from serving.shedding import LoadShedder
from serving.transports import CoalescingTransport

NOTHING = memoryview(b"")
MAX_HEAD_BYTES = 2**16
"""Most bytes received in a row that are not part of a body: headers, or what follows the last chunk. They are parsed
into objects 25 times their size."""
MAX_PIPELINED = 1024
"""Pipelined requests that may wait on one connection. The smallest has 18 bytes but takes a hundred times as much
memory, and after each reply another 256 KB of them are read."""
GRACE_SECONDS = 0.01
"""Delay before an idle connection is closed, so that bytes already received are read first; any delay will do."""
ACCEPT_DELAY_SECONDS = 1e-9
"""Sleep before accepting a connection; some 60 us in practice. Without it, the first worker to wake accepts and keeps
every connection that arrives."""
ACCEPT_DELAY_MAX_CONNECTIONS = 64
"""Connections up to which a worker sleeps: with more, each worker has its share, and a flood of them must not wait."""


class Connection(HttpToolsProtocol):
    receive_seconds = 10.0
    """Longest wait for headers, and for the rest of a body after its reply. Nginx has the same limit."""
    send_seconds = 30.0
    """Longest wait for a client to read the part of a reply that the operating system has not taken."""
    shedder: ClassVar[LoadShedder | None] = None
    delays_accept: ClassVar[bool] = False
    """Whether other processes listen on the same socket: each then leaves the next connection to the others first."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        if self.delays_accept and len(self.connections) < ACCEPT_DELAY_MAX_CONNECTIONS:
            time.sleep(ACCEPT_DELAY_SECONDS)
        super().connection_made(transport)
        self._output = CoalescingTransport(transport, self.loop)
        self.transport = self._output  # type: ignore[assignment]  # behaves like one
        self._sending: asyncio.TimerHandle | None = None
        self._is_refused = False
        """Whether the load shedder has already refused the request being read."""
        self._is_admitted = False
        """Whether the load shedder has admitted the request about to be parsed."""
        self._refusal_due: Response | None = None
        """The refusal of a request that arrived whole; ``_held`` takes what arrives until it is sent."""
        self._held = b""
        self._is_incomplete = False
        """Whether the rest of the headers, or of a refused request's body, has still to be parsed."""
        self._head_bytes = 0
        """Bytes received since the last one of a body, or the last end of headers or of a request."""
        self._is_stopping = False
        """Whether the server stops, so that this connection closes after the next reply."""
        self._await_bytes()

    @property
    def _is_answering(self) -> bool:
        """Whether the latest request parsed has still to be answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_bytes(self) -> None:
        self._receiving = self.loop.call_later(self.receive_seconds, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._refusal_due:
            self._held += data
            self.flow.pause_reading()
            return
        if self.shedder and self.shedder.is_shedding and self._refuse_whole(self.shedder, data):
            return
        # Line breaks before a request do not begin one, but they end the keep-alive timeout.
        if self.timeout_keep_alive_task and data[0] in b"\r\n":
            self._expect_more()
        self._head_bytes += len(data)
        self._feed(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()
        else:
            self._await_rest()

    def _await_rest(self) -> None:
        """Limit the wait for the rest of what is incomplete, unless it is we who read no more of it."""
        is_reading = not (self.flow.read_paused or self.transport.is_closing())
        if self._is_incomplete and self._receiving.cancelled() and is_reading:
            self._await_bytes()

    def _refuse_whole(self, shedder: LoadShedder, data: bytes) -> bool:
        """Refuse a request that arrived whole and alone, bypassing the parser, if ``shedder`` says so.

        At several times the load that it can answer, a worker does little else, and this takes half the time.
        """
        is_busy = self._is_incomplete or (self.cycle and (self.cycle.more_body or not self.cycle.response_complete))
        if is_busy or self.flow.write_paused:
            return False
        request = read_whole(data)
        refusal = request and shedder(*request)
        if not refusal:
            self._is_admitted = request is not None
            return False
        self._expect_nothing()
        self._unset_keepalive_if_required()
        self._refusal_due = refusal
        self.loop.call_later(REFUSAL_SECONDS, self._send_refusal)
        return True

    def _send_refusal(self) -> None:
        if not self._refusal_due:
            return
        refusal, self._refusal_due = self._refusal_due, None
        if self.transport.is_closing():
            return
        self._send(refusal)
        super().on_response_complete()  # of uvicorn: starts the keep-alive timeout, and reads on
        if self._held:
            data, self._held = self._held, b""
            self.data_received(data)

    def shutdown(self) -> None:
        """Stop after the requests that have arrived: on an idle connection, some may not have been read yet."""
        self._is_stopping = True
        if self._is_answering:
            super().shutdown()
        else:
            self.loop.call_later(GRACE_SECONDS, self._stop)

    def _stop(self) -> None:
        self._send_refusal()
        super().shutdown()

    def _feed(self, data: bytes) -> None:
        """Like uvicorn's ``data_received``, except for a request that would change the protocol."""
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest:
                rest = self._parse(rest)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _parse(self, data: memoryview) -> memoryview:
        """Parse ``data``, and return what follows the headers of a request that would change the protocol."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._asks_for_upgrade():
                self._parse_without_upgrade()
                return data[upgrade.args[0] :]
            self.cycle.keep_alive = False  # CONNECT: what follows is not HTTP
        return NOTHING

    def _asks_for_upgrade(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _parse_without_upgrade(self) -> None:
        """Stay with HTTP/1, as a server may (RFC 9110, 7.8): the parser would stop here, and the body would be lost."""
        version = self.parser.get_http_version().encode()
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name not in UPGRADING:  # without them, ``Connection`` asks for nothing
                head.extend((name, b": ", value, b"\r\n"))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"".join((*head, b"\r\n")))

    def _refuse_head(self) -> None:
        if self._is_incomplete and not self._is_refused and not self._is_answering:
            self._hang_up(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"expected headers of at most {MAX_HEAD_BYTES} bytes"
            )
        else:  # no reply can be sent here
            self.transport.abort()

    def _expect_more(self) -> None:
        self._receiving.cancel()
        self._is_incomplete = True

    def _expect_nothing(self) -> None:
        self._receiving.cancel()
        self._is_incomplete, self._head_bytes = False, 0

    def send_400_response(self, msg: str) -> None:
        """Answer input that is not HTTP, after the requests before it."""
        if self._is_answering and not self.cycle.more_body:
            self.cycle.keep_alive = False
        elif self._is_refused or (self._is_answering and (self.pipeline or self.cycle.response_started)):
            self.transport.abort()  # no reply can be sent here
        else:
            self._hang_up(HTTPStatus.BAD_REQUEST, msg)

    def _hang_up(self, status: HTTPStatus, message: str) -> None:
        """Close the connection after an error reply in the usual form."""
        error = ApiError(status, "invalid_request", message, {"connection": "close"})
        metrics.REJECTED.labels(error.code).inc()
        self._send(standalone(error, ()))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """Never: neither to a WebSocket nor to anything else."""
        return False

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError(f"{MAX_PIPELINED} requests are waiting")  # treated like input that is not HTTP
        self._expect_more()
        self._unset_keepalive_if_required()  # the end of an answered request, in the same data, has just started it
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._asks_for_upgrade():
            return
        self._expect_nothing()
        if refusal := self._refusal():
            self._is_refused = True
            self._send(refusal)
            self._expect_more()
        else:
            super().on_headers_complete()
            self.cycle.keep_alive &= not self._is_stopping
        self.headers = []  # trailers after a chunked body are not the request's headers

    def _refusal(self) -> Response | None:
        """The load shedder's refusal. It is asked only where a reply can go out at once and another request follow."""
        if self._is_admitted:  # asked again, the load shedder would count the request among those ahead of it
            self._is_admitted = False
            return None
        if not self.shedder or self._is_answering or self.flow.write_paused or self.expect_100_continue:
            return None
        is_plain = self.parser.get_method() == b"POST" and self.parser.get_http_version() == "1.1"
        return self.shedder(self.url, self.headers) if is_plain and self.parser.should_keep_alive() else None

    def _send(self, response: Response) -> None:
        head = [STATUS_LINE[response.status_code]]
        for name, value in (*self.server_state.default_headers, *response.raw_headers):
            head.extend((name, b": ", value, b"\r\n"))
        self._output.write_through(b"".join((*head, b"\r\n", response.body)))
        if self.transport.get_write_buffer_size():
            self._await_reader()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._asks_for_upgrade():
            return
        self._expect_nothing()
        if self._is_refused:
            self._is_refused = False
            super().on_response_complete()  # of uvicorn: the connection is free again
        else:
            super().on_message_complete()
            if self.cycle.response_complete:
                # Answered before its body arrived, which ended the keep-alive timeout.
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def on_response_complete(self) -> None:
        self._output.flush()
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._await_bytes()
        if self.transport.get_write_buffer_size():
            self._await_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def _await_reader(self) -> None:
        if self._sending is None:
            self._sending = self.loop.call_later(self.send_seconds, self._check_reader, self._output.written)

    def _check_reader(self, written: int) -> None:
        """Abort the connection if any of the first ``written`` bytes are unread; later ones have their own timeout."""
        self._sending = None
        unread = self.transport.get_write_buffer_size()
        if unread > self._output.written - written:
            self.transport.abort()
        elif unread:
            self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, unless a request arrived while the event loop was busy.

        uvloop runs a due timer before it handles data received meanwhile, but a second timer only after that data,
        which cancels it.
        """
        self.timeout_keep_alive_task = self.loop.call_later(GRACE_SECONDS, super().timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receiving, self._sending):
            if timer:
                timer.cancel()
        super().connection_lost(exc)


def install(delays_accept: bool) -> None:
    """Make uvicorn in this process use ``Connection``; call it before uvicorn is configured."""
    Connection.delays_accept = delays_accept
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"


def guard(shedder: LoadShedder) -> None:
    """Let ``shedder`` refuse requests on every connection of this process."""
    Connection.shedder = shedder
