"""Commands for a running router: generate, chat, tokenize, health."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli import options
from services.cli.terminal import errors, screen

if TYPE_CHECKING:
    from services.cli.inference import Inference

DEADLINE_S = 30.0

Router = Annotated[
    str | None,
    typer.Option(
        envvar="QAQ_ROUTER",
        help="host:port, or several, separated by commas. Default: those of the running stack, else 127.0.0.1:7700.",
    ),
]
Session = Annotated[str, typer.Option(help="Continue this session.")]
Named = Annotated[
    str, typer.Option("--model", help="Name of a served model, see `qaq models`; default: the session's, or the first.")
]


def register(app: typer.Typer) -> None:
    for command in (generate, chat, tokenize, health):
        app.command()(command)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text. Default: standard input.")] = None,
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
    model: Named = "",
    tenant: options.Tenant = None,
    router: Router = None,
) -> None:
    """Continues a text."""
    from qaq.v1 import generate_pb2

    from services.cli.inference import inference
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
        model=model,
    )
    called = inference(router, metadata=options.metadata(tenant))
    with called as asked, contextlib.closing(asked.stream(request)) as replies:
        follow(replies)


def chat(
    message: Annotated[
        str | None, typer.Argument(help="One question. Default: a conversation on the terminal.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
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
    session: Annotated[str, typer.Option(help="Continue this session, and leave it open.")] = "",
    model: Named = "",
    tenant: options.Tenant = None,
    router: Router = None,
) -> None:
    """Chats with the model. The worker keeps the session's cache between turns.

    Ctrl-C ends an answer, and at the prompt the conversation.
    """
    from qaq.v1 import generate_pb2

    from services.cli.inference import inference
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
    if session and cache:
        raise typer.BadParameter("a session's cache is chosen when it is opened; leave out --session, or these options")
    called = inference(router, metadata=options.metadata(tenant))
    with called as asked, _session(asked, cache or None, model, session) as continued:
        opening = [{"role": "system", "content": system}] if system else []
        for line in [message] if message is not None else _lines():
            request = generate_pb2.ChatRequest(
                messages=[*opening, {"role": "user", "content": line}],
                sampling=sampling,
                stop=options.given(max_new_tokens=max_new_tokens, stop=stop),
                session_id=continued,
                model=model,
            )
            try:
                with contextlib.closing(asked.stream(request)) as replies:
                    follow(replies)
            except KeyboardInterrupt:
                if message is not None:
                    raise
                errors.print("\nstopped; Ctrl-C once more ends the conversation", highlight=False)
            opening = []


def tokenize(
    text: str,
    no_special_tokens: Annotated[
        bool, typer.Option("--no-special-tokens", help="Leave out the special tokens that a prompt begins with.")
    ] = False,
    model: Named = "",
    router: Router = None,
) -> None:
    """Prints the token ids of a text."""
    from qaq.v1 import generate_pb2

    from services.cli.inference import inference

    request = generate_pb2.TokenizeRequest(model=model, text=text, no_special_tokens=no_special_tokens)
    with inference(router) as asked:
        reply = asked.once(lambda stub: stub.Tokenize(request, timeout=DEADLINE_S))
    screen.out(" ".join(str(token) for token in reply.token_ids))


def health(
    address: Annotated[str, typer.Argument(help="host:port of any server, or http(s)://host:port of a gateway.")],
) -> None:
    """Checks whether a server is serving. The exit code is 0 if it is."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from services.cli.identity import identity
    from services.common.addresses import check_address
    from services.common.channel import open_blocking_channel

    if address.startswith(("http://", "https://")):
        _http_health(address)
        return
    check_address(address)
    with open_blocking_channel(address, identity(address)) as channel:
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
    import ssl
    import urllib.request

    from services.cli.identity import identity

    context = None
    if url.startswith("https://"):
        who = identity(url.removeprefix("https://"))
        context = ssl.create_default_context(cafile=who.ca if who else None)
        if who and who.cert:
            context.load_cert_chain(who.cert, who.key)
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5, context=context) as answer:
            screen.out(f"{url}: {answer.read().decode()}")
    except OSError as error:
        screen.out(f"{url}: {error}")
        raise typer.Exit(1) from error


@contextlib.contextmanager
def _session(asked: Inference, cache: Any, model: str, known: str) -> Iterator[str]:
    """The id of a new session, which is closed at the end, or of one that was there before."""
    if known:
        yield known
        return
    import grpc
    from qaq.v1 import generate_pb2

    from services.common.errors import Unavailable

    opening = generate_pb2.OpenSessionRequest(model=model, cache=cache)
    session = asked.once(lambda stub: stub.OpenSession(opening, timeout=DEADLINE_S)).session_id
    closing = generate_pb2.CloseSessionRequest(session_id=session)
    try:
        yield session
    finally:
        with contextlib.suppress(grpc.RpcError, Unavailable):  # it expires by itself
            asked.once(lambda stub: stub.CloseSession(closing, timeout=DEADLINE_S))


def _lines() -> Iterator[str]:
    """The lines that are typed, until end of file."""
    while True:
        try:
            line = screen.input("[bold cyan]> [/]") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
