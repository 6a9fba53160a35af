"""Validation of requests. Every error has a status, and a message that says what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qaq.v1 import common_pb2, generate_pb2, worker_pb2

from services.common import constraints, parameters
from services.common.bounds import token_ids
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.limits import MAX_CHOICES, MAX_MESSAGES, MAX_SESSION_ID_BYTES, MAX_TENANT, ROLES

MODEL_NOT_FOUND, CONTEXT_LENGTH_EXCEEDED = "model_not_found", "context_length_exceeded"
"""Reasons of errors, as OpenAI's API names them."""


@dataclass(frozen=True)
class Limits:
    """Limits of a router and its model.

    Attributes:
        prompt_bytes: of a prompt in UTF-8, or of all messages of a chat.
        context: tokens. vocabulary: number of token ids. choices: of one prompt.
    """

    prompt_bytes: int
    context: int
    vocabulary: int
    choices: int = MAX_CHOICES


def generate(request: generate_pb2.GenerateRequest, limits: Limits) -> None:
    """Checks everything that does not need the prompt's tokens.

    Raises:
        InvalidArgument: names the field and its range.
    """
    if request.prompt_token_ids:
        if request.prompt:
            raise InvalidArgument("both prompt and prompt_token_ids are set; send one of them")
        may_fit(len(request.prompt_token_ids), limits.context)
        token_ids("prompt_token_ids", request.prompt_token_ids, limits.vocabulary)
    elif not request.prompt:
        raise InvalidArgument("prompt is empty; send at least one character")
    _text_size("prompt", len(request.prompt.encode()), limits)
    _parameters(request, limits)


def chat(request: generate_pb2.ChatRequest, limits: Limits) -> None:
    """As `generate`, for a list of messages."""
    _messages(request.messages, limits)
    _parameters(request, limits)


def tokenize(request: generate_pb2.TokenizeRequest, limits: Limits) -> None:
    if request.messages:
        if request.text:
            raise InvalidArgument("both text and messages are set; send one of them")
        _messages(request.messages, limits)
    _text_size("text", len(request.text.encode()), limits)


def detokenize(request: generate_pb2.DetokenizeRequest, limits: Limits) -> None:
    if len(request.token_ids) > limits.context:
        raise InvalidArgument(f"token_ids has {len(request.token_ids)} tokens; send at most {limits.context}")
    token_ids("token_ids", request.token_ids, limits.vocabulary)


def tenant(name: str) -> None:
    """Raises:
    InvalidArgument: the name is too long. gRPC checks its characters.
    """
    if len(name) > MAX_TENANT:
        raise InvalidArgument(f"the metadata qaq-tenant has {len(name)} characters; send at most {MAX_TENANT}")


def session_id(identifier: str) -> None:
    """Raises:
    InvalidArgument: it is empty, or longer than any session id.
    """
    if not identifier:
        raise InvalidArgument("session_id is empty; send the one that OpenSession returned")
    if len(identifier.encode()) > MAX_SESSION_ID_BYTES:
        raise InvalidArgument(
            f"session_id is over {MAX_SESSION_ID_BYTES} bytes; send the one that OpenSession returned"
        )


def continues(request: generate_pb2.GenerateRequest | generate_pb2.ChatRequest) -> None:
    """Checks a prompt for a session that it names, before the session is looked at.

    Raises:
        InvalidArgument: names the field.
    """
    session_id(request.session_id)
    if request.HasField("cache"):
        raise InvalidArgument("cache is fixed when a session opens; leave it unset, or pass it to OpenSession")
    if request.choices > 1:
        raise InvalidArgument(
            f"choices is {request.choices}, but a session has one text; send 1, or branch the session"
        )


def rejoin(received: int, turn: worker_pb2.RunRequest | None) -> worker_pb2.RunRequest:
    """Returns the turn that a request continues whose client has received so many tokens.

    Raises:
        InvalidArgument: names the field and its range.
        FailedPrecondition: there is no turn, or it has several choices.
    """
    if turn is None:
        raise FailedPrecondition("nothing was generated in this session; send a prompt to it")
    if turn.choices > 1:
        raise FailedPrecondition("a generation of several choices cannot be rejoined; send the request again")
    if received < 0 or (turn.stop.HasField("max_new_tokens") and received > turn.stop.max_new_tokens):
        raise InvalidArgument(f"received is {received}; send the number of its tokens that arrived, 0 for none")
    return turn


def fits(history: int, prompt: int, stop: common_pb2.StopParams, context: int) -> None:
    """Checks that a prompt and the tokens that may be generated fit the model's context.

    Args:
        history: tokens in the session's log before this prompt.
    Raises:
        InvalidArgument: says how many tokens there is room for.
    """
    if prompt == 0:
        raise InvalidArgument("prompt has no tokens; send some text")
    earlier = f" after the {history} tokens of the session" if history else ""
    # The context must have room for at least one new token, unless none is to be generated.
    room = context - history - (not parameters.scored_only(stop))
    if prompt > room:
        raise InvalidArgument(
            f"prompt is {prompt} tokens{earlier}, but this model's maximum context length is {context} tokens and "
            f"has room for {max(room, 0)}; shorten it" + (" or open a new session" if history else ""),
            reason=CONTEXT_LENGTH_EXCEEDED,
        )
    allowed = context - history - prompt
    if stop.max_new_tokens > allowed:
        raise InvalidArgument(
            f"stop.max_new_tokens is {stop.max_new_tokens}, but with a prompt of {prompt} tokens{earlier} this model's "
            f"maximum context length is {context} tokens and allows {allowed}; lower it or shorten the prompt",
            reason=CONTEXT_LENGTH_EXCEEDED,
        )


def may_fit(least: int, context: int) -> None:
    """Checks a prompt that has at least so many tokens, before they are looked at or made.

    Raises:
        InvalidArgument: they are more than the model's context.
    """
    if least > context:
        raise InvalidArgument(
            f"prompt is at least {least} tokens, but this model's maximum context length is {context} tokens; "
            "shorten it",
            reason=CONTEXT_LENGTH_EXCEEDED,
        )


def session(request: generate_pb2.OpenSessionRequest) -> None:
    """Checks a request for a new session."""
    if request.branch_of:
        session_id(request.branch_of)
        if request.HasField("cache"):
            raise InvalidArgument("a branch has the cache parameters of its origin; leave cache unset")
    parameters.cache(request.cache)


def _messages(messages: Sequence[generate_pb2.ChatMessage], limits: Limits) -> None:
    if not messages:
        raise InvalidArgument("messages is empty; send at least one")
    if len(messages) > MAX_MESSAGES:
        raise InvalidArgument(f"messages has {len(messages)} entries; send at most {MAX_MESSAGES}")
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            role = f'"{message.role[:50]}"' if message.role else "empty"
            raise InvalidArgument(f"messages[{place}].role is {role}; use one of {', '.join(ROLES)}")
    if not any(message.content or message.tool_calls_json for message in messages):
        raise InvalidArgument("every message is empty; send at least one character of content")
    _text_size("messages", sum(_message_size(message) for message in messages), limits)


def _message_size(message: generate_pb2.ChatMessage) -> int:
    """Bytes of all texts of a message."""
    texts = (value for field, value in message.ListFields())
    return sum(len(text.encode()) for text in texts)


def _text_size(field: str, size: int, limits: Limits) -> None:
    if size > limits.prompt_bytes:
        raise InvalidArgument(
            f"{field} is {size} bytes of UTF-8; the limit is {limits.prompt_bytes}, and the model's context "
            f"{limits.context} tokens"
        )


def _parameters(request: generate_pb2.GenerateRequest | generate_pb2.ChatRequest, limits: Limits) -> None:
    if not 0 <= request.choices <= limits.choices:
        raise InvalidArgument(f"choices is {request.choices}; send 1 to {limits.choices}")
    parameters.check(request, limits.context, limits.vocabulary)
    constraints.check(request.constraint)
