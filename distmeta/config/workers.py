"""The key `run.workers`: a number of workers, or the bounds of an elastic pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from distmeta.config.parts import describe_validation_error, show_value
from distmeta.errors import InputError, did_you_mean

MOST_WORKERS = 100_000
"""A larger number is taken for a typing error."""
Bound = Annotated[int, Field(ge=1, le=MOST_WORKERS)]


class Elastic(BaseModel):
    """Bounds of an elastic pool. Training starts with `min` workers and uses up to `max` as the cluster has room.

    If workers are lost, training continues with fewer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min: Bound
    max: Bound


def _parse_workers(value: Any) -> int | Elastic:
    if isinstance(value, Elastic):
        return value
    if isinstance(value, Mapping):
        return _parse_bounds(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_WORKERS:
        return value
    raise InputError(
        f"run.workers: got {show_value(value)}, expected a number of workers (0: this process; at most "
        f"{MOST_WORKERS:,}), or {{min: 2, max: 16}}"
    )


def _parse_bounds(value: Mapping[Any, Any]) -> Elastic:
    known = list(Elastic.model_fields)
    for key in value:
        if key not in known:
            raise InputError(f"run.workers.{key}: unknown key; {did_you_mean(str(key), known)}")
    try:
        bounds = Elastic.model_validate(dict(value))
    except ValidationError as error:
        raise InputError(describe_validation_error(error, "run.workers.")) from None
    if bounds.min > bounds.max:
        raise InputError(
            f"run.workers: got min {bounds.min} above max {bounds.max}, expected min to be the smaller: "
            "training starts with it"
        )
    return bounds


def _to_plain(value: int | Elastic) -> int | dict[str, int]:
    return value.model_dump() if isinstance(value, Elastic) else value


Workers = Annotated[int | Elastic, PlainValidator(_parse_workers), PlainSerializer(_to_plain)]
