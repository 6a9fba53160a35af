"""Tools of chat requests: what clients send, and how a model is made to call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field
from qaq.v1 import common_pb2, generate_pb2

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.limits import MAX_TOOLS
from services.gateway import families
from services.gateway.answers import AnswerReader
from services.gateway.constraints import dumped
from services.gateway.objects import Name, Object

MAX_WHITESPACE = 32
"""Whitespace characters in a row in the arguments of a call that is constrained."""

Readers = Callable[[str], AnswerReader]
"""Makes the reader of an answer, given what the chat template puts before it."""

# Every way of writing calls can hold such a name without escapes.
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Object):
    """With `strict` the arguments of every call fit the parameters."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Object):
    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class NamedFunction(Object):
    name: Name


class NamedChoice(Object):
    type: Literal["function"]
    function: NamedFunction


class Tooled(Object):
    """Fields of a chat request about tools and the chat template.

    Attributes:
        chat_template_kwargs: more variables of the chat template; an extension, as vLLM has it.
    """

    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def prepare(body: Tooled, request: generate_pb2.ChatRequest, model: common_pb2.ModelInfo) -> Readers | None:
    """Completes a request by what the model is. Returns how its answers are read; None if they are plain text.

    Raises:
        InvalidArgument: the fields about tools contradict each other.
        FailedPrecondition: it is not known how the model writes calls.
    """
    tools, choice = _chosen(body)
    template = families.template(model)
    if template is None or "content" not in template["fields"]:
        if tools:
            raise FailedPrecondition(f"it is not known how {model.name} writes tool calls; leave tools out")
        _variables(body.chat_template_kwargs or {}, request)
        return None
    request.tools.extend(as_sent(tools))
    if tools:
        _constrain(request, template, tools, choice, body.parallel_tool_calls is not False, model)
    constrained = request.constraint.WhichOneof("kind") is not None
    variables = dict(body.chat_template_kwargs or {})
    if constrained:  # a constraint holds from the first token on
        variables.setdefault("enable_thinking", False)
    _variables(variables, request)
    request.opening = request.output.special_tokens = True
    used = template if tools else families.without_calls(template)

    def reader(opening: str) -> AnswerReader:
        made = AnswerReader(used, opening, [_given(tool) for tool in tools])
        if constrained and made.reasons:
            raise FailedPrecondition(
                f"{model.name} begins every answer with reasoning, which a constraint does not allow; send no "
                "response_format or other constraint, and tool_choice auto"
            )
        return made

    return reader


def as_sent(tools: list[Tool]) -> list[str]:
    """Tools as the router takes them."""
    return [dumped("tools", _given(tool)) for tool in tools]


def _given(tool: Tool) -> dict[str, Any]:
    return tool.model_dump(exclude_unset=True)


def _chosen(body: Tooled) -> tuple[list[Tool], str]:
    """The tools that the model is told of, and "auto", "required" or the name of one."""
    tools, choice = body.tools or [], body.tool_choice or "auto"
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidArgument("two tools have the same name; give each its own")
    if choice == "none":
        return [], "auto"
    if isinstance(choice, NamedChoice):
        if choice.function.name not in names:
            raise InvalidArgument(f'tool_choice names "{choice.function.name}", which is not among the tools')
        return tools, choice.function.name
    if choice == "required" and not tools:
        raise InvalidArgument("tool_choice is required and there are no tools; send some")
    return tools, choice


def _constrain(
    request: generate_pb2.ChatRequest,
    template: families.Template,
    tools: list[Tool],
    choice: str,
    parallel: bool,
    model: common_pb2.ModelInfo,
) -> None:
    """Sets the constraint that makes the model call tools as it was asked to."""
    if choice == "auto" and parallel and not any(tool.function.strict for tool in tools):
        return
    if request.constraint.WhichOneof("kind") is not None:
        raise InvalidArgument(
            "a constraint on the answer leaves no room for tool_choice, strict or parallel_tool_calls; send tools with "
            "tool_choice auto, or no response_format and no other constraint"
        )
    allowed = tools if choice in ("auto", "required") else [t for t in tools if t.function.name == choice]
    tags = [
        families.call(template, tool.function.name, tool.function.parameters or {"type": "object"}, MAX_WHITESPACE)
        for tool in allowed
    ]
    found = [tag for tag in tags if tag is not None]
    if len(found) < len(tags):
        raise FailedPrecondition(
            f"it is not known how {model.name} writes tool calls; send tool_choice auto, without strict or "
            "parallel_tool_calls"
        )
    if choice == "auto":
        form = {
            "type": "triggered_tags",
            "triggers": [families.trigger(found[0])],
            "tags": found,
            "stop_after_first": not parallel,
        }
    else:
        form = {
            "type": "tags_with_separator",
            "tags": found,
            "separator": "\n",
            "at_least_one": True,
            "stop_after_first": choice != "required" or not parallel,
        }
    request.constraint.structural_tag = dumped("tools", {"type": "structural_tag", "format": form})


def _variables(variables: dict[str, Any], request: generate_pb2.ChatRequest) -> None:
    if variables:
        request.chat_template_kwargs = dumped("chat_template_kwargs", variables)
