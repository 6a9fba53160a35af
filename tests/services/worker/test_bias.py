"""Biases that are no numbers."""

from __future__ import annotations

import math

import pytest
from qaq.v1 import common_pb2

from qaq_core.models import LoadedModel
from services.common.errors import InvalidArgument
from services.common.settings import WorkerSettings
from services.worker.request import RequestValidator
from tests.services.worker.conftest import request


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bias_that_is_no_number_is_refused(smollm2: LoadedModel, value: float) -> None:
    validator = RequestValidator(smollm2, WorkerSettings(model="smollm2"))
    sampling = common_pb2.SamplingParams(temperature=0, logit_bias={7: value})
    with pytest.raises(InvalidArgument, match=r"sampling.logit_bias\[7\] is -?(nan|inf); send a number"):
        validator.generation(request([1, 2, 3], sampling=sampling))
