"""Asking a model behind an endpoint that speaks OpenAI's chat completions, through the official client."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from guardkit.checks import check_number, check_whole
from guardkit.images import encode_png
from guardkit.limits import shrink
from guardkit.schema import InputError
from guardkit.vlm.base import CUT_OFF, REFUSED, VERSION, Answer, Question, check_model, one_line, reply
from guardkit.vlm.turns import Turns, calls_of_this_question

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)

T = TypeVar("T")
_NO_COMPLETION = Answer(None, "endpoint sent no chat completion", transient=True)


class OpenAIVLM:
    """A model behind an endpoint that speaks OpenAI's chat completions, such as vLLM, Ollama or a commercial one.

    Key and client are looked for when the first question is asked, so that stored answers need neither.

    Args:
        model: the endpoint's name for it.
        base_url: of the endpoint, up to and including its version.
        api_key_env: the environment variable that holds the key; None for an endpoint without keys.
        temperature: of sampling, at least 0; None for models that take none.
        max_tokens: of a reply, at least 1; None for models that take it under another name (see `options`).
        max_image_px: the longer side of an image in pixels; larger ones are scaled down. Images travel as PNG.
        structured: passes the schema of a question on to the endpoint; switch off where it knows no JSON schemas.
        options: further fields of the request, such as {"max_completion_tokens": 1024, "reasoning_effort": "low"}.
        timeout_s: the longest that a call may take, to the last byte of its answer, in seconds.
        max_retries: further calls for a question that met a timeout, a broken connection, a rate limit or a failing server.
            The official client makes them, after a pause that grows from half a second to eight, or the endpoint's
            Retry-After; one above two minutes ends the attempts.
        requests_per_minute: calls start at least 60 / this many seconds apart, over all threads; None for no limit.
        max_calls: the budget of this object, repetitions included; None for no limit.
        concurrency: calls under way at once.
    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "https://api.openai.com/v1",
        api_key_env: str | None = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        max_image_px: int = 1024,
        structured: bool = True,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 3,
        requests_per_minute: float | None = None,
        max_calls: int | None = None,
        concurrency: int = 4,
    ) -> None:
        check_model(model)
        url = urlsplit(base_url)
        # the address becomes part of stored keys and manifests, so nothing secret may be in it
        if url.scheme not in ("http", "https") or not url.hostname or url.query or "@" in url.netloc:
            raise InputError(
                "vlm.base_url must be http(s)://HOST/PATH without user, password or query, for instance http://localhost:8000/v1; "
                "keys go into the environment variable that vlm.api_key_env names"
            )
        check_number("vlm.temperature", temperature, "[0, inf)", optional=True)
        check_whole("vlm.max_tokens", max_tokens, 1, optional=True)
        check_whole("vlm.max_image_px", max_image_px, 1)
        check_number("vlm.timeout_s", timeout_s, "[0.01, inf)")
        check_whole("vlm.max_retries", max_retries, 0)
        check_number("vlm.requests_per_minute", requests_per_minute, "[0.01, inf)", optional=True)
        check_whole("vlm.max_calls", max_calls, 0, optional=True)
        check_whole("vlm.concurrency", concurrency, 1)
        self.name, self.base_url, self.api_key_env = model, base_url, api_key_env
        self.temperature, self.max_tokens, self.max_image_px = temperature, max_tokens, max_image_px
        self.structured, self.options = structured, dict(options or {})
        self.timeout_s, self.max_retries, self.concurrency = timeout_s, max_retries, concurrency
        self.requests_per_minute, self.max_calls = requests_per_minute, max_calls
        self._turns = Turns(requests_per_minute, max_calls)

    @property
    def config(self) -> dict[str, Any]:
        """Everything the answers depend on."""
        names = ("base_url", "temperature", "max_tokens", "max_image_px", "structured", "options")
        return {"vlm": "openai", "version": VERSION, "model": self.name} | {name: getattr(self, name) for name in names}

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in order.

        Raises:
            InputError: no client, no key, a key or a model that the endpoint does not accept, an endpoint that redirects.
        """
        return _run(self._ask_all(questions)) if questions else []

    @property
    def n_calls(self) -> int:
        """Calls made so far, repetitions included."""
        return self._turns.n_calls

    async def _ask_all(self, questions: Sequence[Question]) -> list[Answer]:
        free = asyncio.Semaphore(self.concurrency)

        async def answer(question: Question) -> Answer:
            async with free:
                return await self._answer(client, question)

        # a client per call, because one that is kept would be carried over into forked worker processes
        async with self._client() as client:
            tasks = [asyncio.create_task(answer(question)) for question in questions]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # after an error that every question would meet, or Ctrl-C
                    task.cancel()

    def _client(self) -> openai.AsyncOpenAI:
        try:
            import openai

            from guardkit.vlm.outgoing import BoundedClient
        except ImportError as error:
            raise InputError('asking a model endpoint needs the openai client; install it with: pip install "guardkit[vlm]"') from error
        key = "none" if self.api_key_env is None else os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise InputError(
                f"the environment variable {self.api_key_env} holds no key for {self.base_url}; set it, name another in vlm.api_key_env, "
                "or give null for an endpoint without keys"
            )
        bounded = BoundedClient(self._turns, self.timeout_s)
        return openai.AsyncOpenAI(
            api_key=key, base_url=self.base_url, timeout=self.timeout_s, max_retries=self.max_retries, http_client=bounded
        )

    async def _answer(self, client: openai.AsyncOpenAI, question: Question) -> Answer:
        import openai

        from guardkit.vlm.outgoing import Ended

        request = await asyncio.to_thread(self._request, question)
        try:
            answer = _read(await client.chat.completions.create(**request))
        except Ended as end:
            if isinstance(end.outcome, InputError):
                raise end.outcome from None
            answer = end.outcome
        except (openai.AuthenticationError, openai.NotFoundError) as error:
            what = "the key" if isinstance(error, openai.AuthenticationError) else f"the address or the model {self.name!r}"
            raise InputError(
                f"{self.base_url} does not accept {what} ({self._said(error, client)}); check vlm.model, vlm.base_url and the "
                f"environment variable {self.api_key_env}"
            ) from error
        except openai.APIError as error:
            answer = replace(self._failure(error), detail=self._said(error, client))
        except (ValueError, RecursionError) as error:  # a body that says it is JSON and is not
            answer = replace(_NO_COMPLETION, detail=one_line(str(error)))
        answer = replace(answer, n_calls=calls_of_this_question())
        if answer.transient and answer.n_calls:
            log.warning("%s: %s (%s)", self.name, answer.reason, answer.detail)
        return answer

    def _request(self, question: Question) -> dict[str, Any]:
        shown = [base64.b64encode(encode_png(shrink(image, self.max_image_px))).decode() for image in question.images]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in shown]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": question.prompt}]}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        request: dict[str, Any] = {"model": self.name, "messages": messages, "extra_body": self.options}
        wanted = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": question.seed}
        request |= {name: value for name, value in wanted.items() if value is not None}
        if question.schema is not None and self.structured:
            # not strict, because strict endpoints refuse length limits and optional keys; what comes back is checked anyway
            form = {"name": "reply", "strict": False, "schema": dict(question.schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": form}
        return request

    def _failure(self, error: openai.APIError) -> Answer:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return Answer(None, f"timeout: the endpoint gave no whole answer within {self.timeout_s:g} s", transient=True)
        if not isinstance(error, openai.APIStatusError):
            return Answer(None, "endpoint cannot be reached", transient=True)
        if error.status_code == 429:
            return Answer(None, "rate limit or quota of the endpoint (HTTP 429)", transient=True)
        if error.status_code == 400 and error.code in ("content_filter", "content_policy_violation"):
            return REFUSED
        what = "rejected the request" if error.status_code < 500 else "failed"
        return Answer(None, f"endpoint {what} (HTTP {error.status_code})", transient=True)

    def _said(self, error: openai.APIError, client: openai.AsyncOpenAI) -> str:
        return one_line(error.message.replace(client.api_key, "***") if self.api_key_env else error.message)


def _read(completion: Any) -> Answer:
    """What a chat completion says. The client checks no types, and passes on as text what is no JSON, such as HTML."""
    try:
        choice = completion.choices[0]
        message, finish = choice.message, choice.finish_reason
        text, refusal = message.content, getattr(message, "refusal", None)
    except (AttributeError, IndexError, KeyError, TypeError):
        said = completion if isinstance(completion, str) else getattr(completion, "error", "")
        return replace(_NO_COMPLETION, detail=one_line(str(said or "")))
    if refusal or finish == "content_filter":
        return replace(REFUSED, detail=one_line(str(refusal or "")))
    if finish == "length":
        return CUT_OFF
    if not isinstance(text, str | None):
        return _NO_COMPLETION
    return reply(text or "")


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()
