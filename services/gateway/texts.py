"""Tokenizing and detokenizing, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from qaq.v1 import generate_pb2

from services.common.errors import InvalidArgument
from services.common.routers import Routers
from services.gateway import models, requests
from services.gateway.caller import caller
from services.gateway.constraints import dumped
from services.gateway.messages import Messages
from services.gateway.objects import Name, Object, TokenIds
from services.gateway.replies import Json
from services.gateway.tools import Tools, as_sent
from services.gateway.wire import JsonRoute

DEADLINE_S = 60.0


class TokenizeRequest(Object):
    """A text, or messages of a chat."""

    model: Name = ""
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    tools: Tools = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _has_one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidArgument("prompt or messages is needed; send one of them")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            raise InvalidArgument("tools and chat_template_kwargs are for messages; leave them out")
        if self.messages is not None and self.add_special_tokens:
            raise InvalidArgument("add_special_tokens is for a prompt; a chat template writes its own")
        return self


class DetokenizeRequest(Object):
    model: Name = ""
    tokens: TokenIds


def _json(variables: dict[str, Any]) -> str:
    return dumped("chat_template_kwargs", variables) if variables else ""


def routes(routers: Routers) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Json:
        metadata = caller(request)
        model = await models.served(routers, metadata, body.model, request=request)
        asked = generate_pb2.TokenizeRequest(
            model=body.model,
            text=body.prompt or "",
            messages=requests.messages(body.messages or []),
            no_special_tokens=body.add_special_tokens is False,
            no_generation_prompt=not body.add_generation_prompt,
            tools=as_sent(body.tools),
            chat_template_kwargs=_json(body.chat_template_kwargs),
            token_strings=body.return_token_strs,
        )
        async with routers.stub() as stub:
            reply = await stub.Tokenize(asked, timeout=DEADLINE_S, metadata=metadata)
        return {
            "count": len(reply.token_ids),
            "max_model_len": model.context_length,
            "tokens": list(reply.token_ids),
            "token_strs": list(reply.tokens) if body.return_token_strs else None,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Json:
        asked = generate_pb2.DetokenizeRequest(model=body.model, token_ids=body.tokens)
        async with routers.stub() as stub:
            reply = await stub.Detokenize(asked, timeout=DEADLINE_S, metadata=caller(request))
        return {"prompt": reply.text}

    return router
