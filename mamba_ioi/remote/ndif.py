"""The wire to an NDIF server: requests, retries, and every fault in one sentence that never holds the API key."""

from __future__ import annotations

import json
import logging
import re
import socket
import time

import httpx
import websocket
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.ndif import EnvComparison, get_local_env
from nnsight.schema.response import Status
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from .traffic import Traffic, public_url

logger = logging.getLogger(__name__)

TRIES, LONGEST_WAIT = 7, 30.0
"""How often a request is sent before a transient fault is final, and the longest pause in between, in seconds: with
pauses of 1, 2, 4, ... seconds a server has about a minute to come back."""
CONNECT_TIMEOUT = 10.0
SILENCE = 30.0
"""After so many seconds without a word about a job, the server is asked whether it is still there."""

_TRANSIENT = ("evicted", "critical server error", "error submitting request", "cancelled or preempted", "reconnecting")


class Backend(RemoteBackend):
    """nnsight's backend, which says what went wrong, tries again what may pass, and counts what is sent.

    Args:
        model_key: the model's name on servers.
        host: the server's URL; that of nnsight's configuration if None.
        traffic: where to count.
        quiet: whether to show no progress of the job.
        env: what the server applies to the model.
    """

    def __init__(self, model_key: str, host: str | None, traffic: Traffic, *, quiet: bool, env: dict) -> None:
        super().__init__(model_key, host=host, env=env)
        self.traffic = traffic
        if quiet:
            self.display.enabled = False

    def request(self, request, tracer):
        """Send a request until it is answered, or a fault is final."""
        blob = self._serialize(tracer)
        tries = Retrying(
            retry=retry_if_exception_type(ConnectionError),
            wait=wait_exponential(max=LONGEST_WAIT),
            stop=stop_after_attempt(TRIES if self.traffic.requests else 1),
            before_sleep=self._note_retry,
            reraise=True,
        )
        return tries(self._exchange, request, blob)

    def finalize(self, content):
        """Unpack an answer."""
        self.traffic.received += len(content)
        return super().finalize(content)

    def _exchange(self, request, blob: bytes):
        started, connection = time.monotonic(), None
        try:
            connection = websocket.create_connection(
                f"{self.ws_host}/subscribe",
                header={"ndif-api-key": self.api_key} if self.api_key else None,
                timeout=CONNECT_TIMEOUT,
            )
            request.session_id = json.loads(connection.recv())["session_id"]
            self.traffic.sent += len(blob)
            self.send(request, blob)
            result = self._wait(connection)
        except Exception as error:
            raise self.fault(error) from None  # what came before may hold the key
        finally:
            if connection is not None:
                connection.close()
        self.traffic.requests += 1
        logger.debug("a request of %d bytes was answered in %.2f s", len(blob), time.monotonic() - started)
        return result

    def _wait(self, connection):
        """The result, once the server says that the job is done."""
        connection.settimeout(0.1 if self.display.enabled else SILENCE)
        heard = time.monotonic()
        while True:
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                self.display.refresh()
                if time.monotonic() - heard >= SILENCE:
                    httpx.get(f"{self.host}/ping", timeout=CONNECT_TIMEOUT).raise_for_status()
                    heard = time.monotonic()
                continue
            heard = time.monotonic()
            response = self.parse(message)
            result = self.handle(response)
            if response.status == Status.COMPLETED:
                return result

    def _note_retry(self, state: RetryCallState) -> None:
        if state.outcome and state.next_action:
            logger.warning("%s; trying again in %.0f s", state.outcome.exception(), state.next_action.sleep)

    def fault(self, error: Exception) -> Exception:
        """The error to raise instead, in one sentence."""
        where = public_url(self.host)
        if isinstance(error, RemoteError) and isinstance(error.__cause__, httpx.HTTPError):
            detail = str(error).removeprefix("Failed to send request: ")
            error = error.__cause__
        else:
            detail = str(error)
        detail = self.without_key(detail)
        if isinstance(error, httpx.HTTPStatusError):
            return self._refusal(where, error.response.status_code, detail)
        if isinstance(error, websocket.WebSocketBadStatusException):
            return self._refusal(where, error.status_code, "")
        if isinstance(error, RemoteError):
            return self._failed_job(where, detail)
        if isinstance(error, socket.gaierror | websocket.WebSocketAddressException):
            return ConnectionError(f"the host of {where} is not known: check the URL and the network")
        if isinstance(error, ConnectionRefusedError):
            return ConnectionError(f"nothing answers at {where}: the NDIF server is down, or the URL is wrong")
        if isinstance(error, websocket.WebSocketTimeoutException | TimeoutError | httpx.TimeoutException):
            return ConnectionError(f"{where} did not answer in time: the NDIF server is busy or down")
        if isinstance(error, OSError | websocket.WebSocketException | httpx.TransportError):
            return ConnectionError(f"the connection to {where} was lost")
        if isinstance(error, json.JSONDecodeError | KeyError | UnicodeDecodeError):
            return ValueError(f"{where} answers, but not as an NDIF server: check the URL")
        return error

    def _refusal(self, where: str, status: int, detail: str) -> Exception:
        """What an HTTP status means."""
        if status == 401 and not self.api_key:
            return ValueError(f"{where} wants an API key: set NDIF_API_KEY, or run 'nnsight login'")
        if status in (401, 403) or "api key" in detail.lower():
            return ValueError(f"{where} refuses the API key: check NDIF_API_KEY, or run 'nnsight login' again")
        if status >= 500 or status == 429:
            return ConnectionError(f"{where} is not ready: {_first(detail) or f'HTTP status {status}'}")
        if not detail:
            return ValueError(f"{where} answers, but not as an NDIF server (HTTP status {status}): check the URL")
        return ValueError(f"{where} refuses the request: {_first(detail)}")

    def _failed_job(self, where: str, description: str) -> Exception:
        """What the description of a failed job means."""
        if limit := re.search(r"exceeded the execution timeout of ([\d.]+)", description):
            return TimeoutError(f"the request ran longer than the {limit[1]} s that {where} allows")
        if refused := re.search(r"(could not deploy|error (starting|provisioning)) .*", description, re.I):
            return ValueError(f"{where} cannot run {_repository(self.model_key)}: {refused[0]}")
        if any(phrase in description.lower() for phrase in _TRANSIENT):
            return ConnectionError(f"{where} dropped the request: {_first(description)}")
        return RemoteError(description)

    def without_key(self, text: str) -> str:
        """The text without the API key, which some servers repeat."""
        return text.replace(self.api_key, "...") if self.api_key else text


def compare(host: str) -> EnvComparison:
    """nnsight's comparison of the packages here and on a server.

    Raises:
        ConnectionError: if the server does not say what it has.
    """
    return EnvComparison(get_local_env(), get(host, "/env"))


def get(host: str, path: str, *, api_key: str | None = None):
    """What a server says under a path.

    Raises:
        ConnectionError: if it cannot be reached, or is not ready.
        ValueError: if it is no NDIF server.
    """
    backend = Backend("", host, Traffic(), quiet=True, env={})
    try:
        response = httpx.get(
            f"{backend.host}{path}",
            timeout=httpx.Timeout(CONNECT_TIMEOUT, read=60),
            headers={"ndif-api-key": api_key} if api_key else None,
        )
        response.raise_for_status()
        return response.json()
    except httpx.ConnectError as error:
        name = isinstance(error.__cause__ and error.__cause__.__cause__, socket.gaierror) or "Name or" in str(error)
        raise backend.fault(socket.gaierror() if name else ConnectionRefusedError()) from None
    except (httpx.HTTPError, ValueError) as error:
        raise backend.fault(error) from None


def _repository(model_key: str) -> str:
    """The Hub id in a model's name on servers."""
    return json.loads(model_key.partition(":")[2])["repo_id"]


def _first(text: str) -> str:
    """The first line of a text."""
    return (text.strip().splitlines() or [""])[0]
