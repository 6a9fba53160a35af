"""Every command of README, CONTRIBUTING and docs/: the test that runs it, or why none does.

A command is found by its beginning, the longest one first. `test_commands.py` checks that none is missing or unused.
"""

from __future__ import annotations

NETWORK = "it downloads packages, which a test does not"
CONTAINERS = "it needs an engine for containers; make compose runs them: test_a_chat"
CLUSTER = "it needs a Kubernetes cluster and a registry; the chart is rendered by test_kubernetes_takes_it"
NODES = "it needs a Ray cluster of several nodes; make cluster runs the like: "
QUIET = "a measurement, which needs a quiet machine; what it measures is tested by "
PLACES = "an assignment of the shell, used by the commands beside it"

RUN_BY = {
    ".venv/bin/qaq up": "test_a_stack_comes_up_scales_and_goes",
    "QAQ_API_KEY=qaq_… qaq chat": "test_a_session_that_is_there_is_continued_and_stays",
    "QAQ_REDIS_URL=rediss://… QAQ_HOST=0.0.0.0 qaq worker": "test_its_commands_answer_a_request",
    "QAQ_TENANTS_FILE=tenants.json qaq router": "test_its_commands_answer_a_request",
    'python -c "from setuptools import setup': "test_a_build_without_a_compiler_succeeds",
    "python examples/grpc_client.py": "test_grpc_client",
    "curl -N": "test_a_chat_is_watched_and_its_price_is_set",
    "qaq bench serve --json": "test_a_mix",
    "qaq bench serve --router": "test_a_trace",
    "qaq certificates": "test_certificates",
    "qaq chat": "test_a_session_that_is_there_is_continued_and_stays",
    "qaq down": "test_a_stack_comes_up_scales_and_goes",
    "qaq estimate": "test_the_command",
    "qaq eval --text": "test_rows_are_written_and_a_second_run_takes_them_from_before",
    "qaq eval --recall": "test_rows_are_written_and_a_second_run_takes_them_from_before",
    "qaq eval --turns": "test_turns",
    "qaq eval --needle ": "test_needle",
    "qaq eval --long": "test_long_answers",
    "qaq eval --needles": "test_what_is_asked_late",
    "qaq eval --formats": "test_what_is_asked_late",
    "qaq eval --tasks": "test_tasks",
    "qaq gateway": "test_its_commands_answer_a_request",
    "qaq key": "test_a_key_is_printed_once_and_alone",
    "qaq models": "test_models_come_answer_and_go",
    "qaq originals": "test_its_commands_answer_a_request",
    "qaq paper": "test_keys_are_more_sensitive_than_values",
    "qaq router": "test_its_commands_answer_a_request",
    "qaq scale": "test_a_stack_comes_up_scales_and_goes",
    "qaq status": "test_a_stack_comes_up_scales_and_goes",
    "qaq tokenizer": "test_load_clients_read_what_it_writes",
    "qaq up --http-port": "test_a_stack_comes_up_scales_and_goes",
    "qaq up --workers": "test_a_stack_comes_up_scales_and_goes",
    "qaq worker": "test_its_commands_answer_a_request",
}

NOT_RUN = {
    "git clone …": "a placeholder",
    "pip install": NETWORK,
    "pipx run cibuildwheel": f"{NETWORK}; what it builds is checked by test_the_build_lists_every_source",
    "make demo": f"{NETWORK}; what it then runs is test_the_figures_are_as_their_schema_says",
    "make lint": "continuous integration runs it before the tests",
    "make test-fast": "a part of the tests themselves",
    "QAQ_SMG=1 qaq up": "make clients runs it; it is not a part of make test. With keys: test_smg_sends_no_keys",
    "make test": "the tests themselves",
    "smg launch": "make clients runs it; it is not a part of make test",
    "curl http://127.0.0.1:30000": "make clients asks the same; it is not a part of make test",
    "curl --cacert": CONTAINERS,
    "docker ": CONTAINERS,
    'QAQ="docker run': CONTAINERS,
    "docker build --target cpu --tag registry.example.com": CLUSTER,
    "REDIS_URL=": CLUSTER,
    "deploy/kubernetes-secrets": CLUSTER,
    "helm install": CLUSTER,
    "kubectl ": CLUSTER,
    "curl --cacert secrets/client": CLUSTER,
    "printf 'FROM qaq:cpu": "it makes an image, which needs an engine for containers and PyPI",
    "ray start": f"{NODES}test_a_node_dies_with_its_worker",
    "qaq up --address": f"{NODES}test_a_node_dies_with_its_worker",
    "qaq drain": f"{NODES}test_a_node_is_drained",
    "qaq restart workers": f"{NODES}test_all_workers_are_replaced",
    "python -m tests.services.collector": f"{QUIET}test_one_call_is_one_trace_over_every_role",
    "qaq bench serve $LOAD": f"{QUIET}test_one_call_is_one_trace_over_every_role",
    "OTEL_EXPORTER_OTLP_ENDPOINT=": f"{QUIET}test_one_call_is_one_trace_over_every_role",
    "LOAD=": PLACES,
    "export ": PLACES,
}
