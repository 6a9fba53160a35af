"""Messages of a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.common.limits import MAX_MESSAGES, MAX_TOOL_CALLS
from services.gateway.objects import Name, Object


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class CalledFunction(Object):
    """With JSON of the arguments."""

    model_config = ConfigDict(extra="ignore")

    name: Name
    arguments: str = "{}"


class ToolCall(Object):
    """A call that an earlier answer made."""

    model_config = ConfigDict(extra="ignore")

    id: Name = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Object):
    """A message, also as an answer of this API or of another one has it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_MESSAGES)] = ""
    refusal: str = ""
    name: Name = ""
    reasoning_content: str = ""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOL_CALLS)] = Field(
        default_factory=list
    )
    tool_call_id: Name = ""
    annotations: Any = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_lists(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name == "content" or value not in ([], {})}

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError("content is missing; send a text")
        return self

    @property
    def text(self) -> str:
        """The content; of an assistant that refused, its refusal."""
        if isinstance(self.content, str):
            return self.content or self.refusal
        return "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(fail_fast=True, max_length=MAX_MESSAGES)]
