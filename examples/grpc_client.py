"""A session over gRPC: two prompts of one text, streamed token by token.

qaq up      # prints the line that sets QAQ_API_KEY
python examples/grpc_client.py --ca ~/.local/state/qaq/ca.pem

Any language's gRPC works the same way; the contract is proto/qaq/v1/generate.proto.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import grpc
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc

Metadata = list[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", default="127.0.0.1:7700", help="host:port")
    parser.add_argument("--ca", type=Path, help="the CA of the router's certificate; default: no TLS")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("prompts", nargs="*", default=["The capital of France is", " The capital of Italy is"])
    options = parser.parse_args()

    key = [("authorization", f"Bearer {given}")] if (given := os.environ.get("QAQ_API_KEY")) else []
    with connect(options.router, options.ca) as channel:
        router = generate_pb2_grpc.InferenceStub(channel)
        cache = common_pb2.CacheParams(preset="balanced", target_bits=3)
        session = router.OpenSession(generate_pb2.OpenSessionRequest(cache=cache), metadata=key).session_id
        try:
            for prompt in options.prompts:
                generate(router, key, session, prompt, options.max_new_tokens)
        finally:
            router.CloseSession(generate_pb2.CloseSessionRequest(session_id=session), metadata=key)


def connect(router: str, ca: Path | None) -> grpc.Channel:
    """A channel to host:port."""
    if ca is None:
        return grpc.insecure_channel(router)
    return grpc.secure_channel(router, grpc.ssl_channel_credentials(ca.read_bytes()))


def generate(router: generate_pb2_grpc.InferenceStub, key: Metadata, session: str, prompt: str, most: int) -> None:
    """Continues a session's text with a prompt and prints what the model adds."""
    request = generate_pb2.GenerateRequest(
        session_id=session,
        prompt=prompt,
        sampling=common_pb2.SamplingParams(temperature=0),
        stop=common_pb2.StopParams(max_new_tokens=most),
    )
    print(prompt, end="", flush=True)
    for reply in router.Generate(request, timeout=300, metadata=key):
        if reply.HasField("token"):
            print(reply.token.text, end="", flush=True)
        elif reply.HasField("finished"):
            usage = reply.finished.usage
            print(reply.finished.text)
            print(f"[{usage.generated_tokens} tokens, the first after {usage.ttft_ms:.0f} ms]")


if __name__ == "__main__":
    main()
