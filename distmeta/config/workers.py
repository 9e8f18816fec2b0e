"""`run.workers`: a number, or the bounds of an elastic pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from distmeta.config.parts import describe_validation_error, show_value
from distmeta.errors import InputError, did_you_mean

MOST = 100_000
"""Workers of one run: more is a slip of the finger."""
Bound = Annotated[int, Field(ge=1, le=MOST)]


class Elastic(BaseModel):
    """Training starts with `min` workers, uses up to `max` as the cluster has room, and goes on with fewer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min: Bound
    max: Bound


def _parse(value: Any) -> int | Elastic:
    if isinstance(value, Elastic):
        return value
    if isinstance(value, Mapping):
        return _elastic(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST:
        return value
    raise InputError(
        f"run.workers: got {show_value(value)}, expected a number of workers (0: this process; at most {MOST:,}), "
        "or {min: 2, max: 16}"
    )


def _elastic(value: Mapping[Any, Any]) -> Elastic:
    for key in value:
        if key not in Elastic.model_fields:
            raise InputError(
                f"run.workers.{key}: unknown key; {did_you_mean(str(key), list(Elastic.model_fields))}"
            )
    try:
        bounds = Elastic.model_validate(dict(value))
    except ValidationError as error:
        raise InputError(describe_validation_error(error, "run.workers.")) from None
    if bounds.min > bounds.max:
        raise InputError(
            f"run.workers: got min {bounds.min} above max {bounds.max}, expected min to be the smaller: "
            "it is what training starts with"
        )
    return bounds


def _plain(value: int | Elastic) -> int | dict[str, int]:
    return value.model_dump() if isinstance(value, Elastic) else value


Workers = Annotated[int | Elastic, PlainValidator(_parse), PlainSerializer(_plain)]
