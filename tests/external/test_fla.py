"""Our operators against fla-core's naive functions: outputs, final states and gradients."""

from __future__ import annotations

import pytest

from tests.external.program import Errors, errors_of
from tests.support.packages import needs

pytestmark = needs("fla", "triton")

STATE = {"S", "d S"}
LINEAR = {"o", "d q", "d k", "d v"}
OPERATORS = {  # what is compared, of a batch and of packed documents
    "linear": LINEAR | STATE,
    "linear normalized": LINEAR | STATE | {"z", "d z"},
    "lightning": LINEAR | STATE | {"d slope"},
    "retention": LINEAR,
    "simple_gla": LINEAR | STATE | {"d log_decay"},
    "simple_gla in chunks": LINEAR | STATE | {"d log_decay"},
    "gla": LINEAR | STATE | {"d log_decay"},
    "hgrn": STATE | {"o", "d v", "d log_decay"},
    "rwkv6": LINEAR | STATE | {"d log_decay", "d bonus"},
    "based": LINEAR,
    "rebased": LINEAR,
    "delta_rule": LINEAR | STATE | {"d beta"},
    "gated_delta_rule": LINEAR | STATE | {"d beta", "d log_decay"},
    "gated_delta_product": LINEAR | STATE | {"d beta", "d log_decay"},
    "comba": LINEAR | {"d beta", "d log_decay", "d feedback"},
    "kda": LINEAR | STATE | {"d beta", "d log_decay"},
    "attention": LINEAR,
    "attention in a window": LINEAR,
}


@pytest.fixture(scope="module")
def errors() -> Errors:
    return errors_of("fla_core")


@pytest.mark.parametrize("operator", OPERATORS)
def test_agrees_with_fla(errors: Errors, operator: str) -> None:
    found = errors[operator]
    assert found.keys() == {f"{form} {name}" for form in ("batch", "packed") for name in OPERATORS[operator]}
    assert {name: error for name, error in found.items() if not error <= 1e-5} == {}


def test_nothing_else_is_reported(errors: Errors) -> None:
    assert errors.keys() == OPERATORS.keys()
