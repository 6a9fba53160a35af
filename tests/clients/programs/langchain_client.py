"""What LangChain gets from an address, a model and perhaps a tool: JSON on standard output."""

import json
import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    """The city that was asked for."""

    city: Literal["Paris", "Rome"]


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It rains in {city}."


url, model, *tools = sys.argv[1:]
chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", max_retries=0, temperature=0, max_tokens=60)
question = "Name the capital of France."
got = {
    "answer": chat.invoke(question).content,
    "streamed": [part.content for part in chat.stream(question)],
    "structured": chat.with_structured_output(Answer, method="json_schema").invoke(question).city,
}
if tools:  # a tool that is to be called
    called = chat.bind_tools([weather], tool_choice=tools[0]).invoke("What is the weather in Rome?")
    got["called"] = [[call["name"], call["args"]] for call in called.tool_calls]
    got["weather"] = [weather.invoke(call).content for call in called.tool_calls]
print(json.dumps(got))
