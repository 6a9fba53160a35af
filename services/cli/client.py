"""Commands that talk to a router: generate, chat, tokenize, health."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli import options
from services.cli.terminal import screen

if TYPE_CHECKING:
    from qaq.v1 import generate_pb2_grpc

DEFAULT_ROUTER = "127.0.0.1:7700"
DEADLINE_S = 600.0

Router = Annotated[
    str | None, typer.Option(envvar="QAQ_ROUTER", help="host:port; else the running stack's, else 127.0.0.1:7700.")
]
Session = Annotated[str, typer.Option(help="Continue this session.")]


def register(app: typer.Typer) -> None:
    for command in (generate, chat, tokenize, health):
        app.command()(command)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text; standard input if it is left out.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the text from a file.")] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    stop_token_id: options.StopTokenId = None,
    ignore_eos: options.IgnoreEos = False,
    preset: options.Preset = None,
    target_bits: options.TargetBits = None,
    target_compression: options.TargetCompression = None,
    target_error: options.TargetError = None,
    session: Session = "",
    tenant: options.Tenant = None,
    router: Router = None,
) -> None:
    """Continues a text."""
    from qaq.v1 import generate_pb2

    from services.cli.streaming import follow

    text = prompt_file.read_text() if prompt_file else prompt if prompt is not None else sys.stdin.read()
    request = generate_pb2.GenerateRequest(
        prompt=text,
        sampling=options.given(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=options.biases(logit_bias),
            seed=seed,
        ),
        stop=options.given(
            max_new_tokens=max_new_tokens, stop=stop, stop_token_ids=stop_token_id, ignore_eos=ignore_eos
        ),
        cache=options.given(
            preset=preset,
            target_bits=target_bits,
            target_compression=target_compression,
            target_error=target_error,
        )
        or None,
        session_id=session,
    )
    with inference(router) as stub:
        follow(stub.Generate(request, timeout=DEADLINE_S, metadata=options.metadata(tenant)))


def chat(
    message: Annotated[str | None, typer.Argument(help="One question; without it a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    preset: options.Preset = None,
    target_bits: options.TargetBits = None,
    target_compression: options.TargetCompression = None,
    target_error: options.TargetError = None,
    tenant: options.Tenant = None,
    router: Router = None,
) -> None:
    """Talks with the model. The session's cache stays with the worker between the turns."""
    from qaq.v1 import generate_pb2

    from services.cli.streaming import follow

    sampling = options.given(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        logit_bias=options.biases(logit_bias),
        seed=seed,
    )
    cache = options.given(
        preset=preset,
        target_bits=target_bits,
        target_compression=target_compression,
        target_error=target_error,
    )
    with inference(router) as stub, _session(stub, cache or None) as session:
        opening = [{"role": "system", "content": system}] if system else []
        for line in [message] if message is not None else _lines():
            request = generate_pb2.ChatRequest(
                messages=[*opening, {"role": "user", "content": line}],
                sampling=sampling,
                stop=options.given(max_new_tokens=max_new_tokens, stop=stop),
                session_id=session,
            )
            follow(stub.Chat(request, timeout=DEADLINE_S, metadata=options.metadata(tenant)))
            opening = []


def tokenize(text: str, plain: bool = False, router: Router = None) -> None:
    """Prints the token ids of a text."""
    from qaq.v1 import generate_pb2

    with inference(router) as stub:
        reply = stub.Tokenize(generate_pb2.TokenizeRequest(text=text, plain=plain), timeout=30)
    screen.out(" ".join(str(token) for token in reply.token_ids))


def health(
    address: Annotated[
        str, typer.Argument(help="host:port of any of the servers; http://host:port of a gateway.")
    ],
) -> None:
    """Asks a server whether it serves; the exit code says so."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    if address.startswith("http://"):
        _http_health(address)
        return
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError as error:
            screen.out(f"{address}: {error.code().name}")
            raise typer.Exit(1) from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    screen.out(f"{address}: {name}")
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(1)


def _http_health(url: str) -> None:
    import urllib.request

    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            screen.out(f"{url}: {answer.read().decode()}")
    except OSError as error:
        screen.out(f"{url}: {error}")
        raise typer.Exit(1) from error


@contextlib.contextmanager
def inference(router: str | None) -> Iterator[generate_pb2_grpc.InferenceStub]:
    """A client of the router that is named, or of the stack that runs here."""
    import grpc
    from qaq.v1 import generate_pb2_grpc

    from services.cluster import state

    if router is None:
        running = state.load()
        router = running.router if running is not None else DEFAULT_ROUTER
    with grpc.insecure_channel(router) as channel:
        yield generate_pb2_grpc.InferenceStub(channel)


@contextlib.contextmanager
def _session(stub: generate_pb2_grpc.InferenceStub, cache: Any) -> Iterator[str]:
    from qaq.v1 import generate_pb2

    opened = stub.OpenSession(generate_pb2.OpenSessionRequest(cache=cache), timeout=30)
    try:
        yield opened.session_id
    finally:
        stub.CloseSession(generate_pb2.CloseSessionRequest(session_id=opened.session_id), timeout=30)


def _lines() -> Iterator[str]:
    """What is typed, until end of file."""
    while True:
        try:
            line = screen.input("[bold cyan]> [/]") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
