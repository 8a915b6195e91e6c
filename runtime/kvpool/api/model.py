"""What all models of the specification share: frozen, no unknown fields, camelCase in YAML and snake_case in Python.

Also the vocabulary of their fields: sizes, spans, counts, names, and how a rule between fields reports what it found.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from kvpool.api.duration import Duration
from kvpool.api.quantity import MOST, NOT_NEGATIVE, Quantity

Path: TypeAlias = tuple[str | int, ...]
"""Where a value stands, in the names of the YAML: `("spec", "models", 1, "quotas")`."""

RULE = "kvpool_rule"
"""The error type of what a `Fault` says, in pydantic's errors."""


class Model(BaseModel):
    """A part of the specification."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    NOT_FIELDS: ClassVar[dict[str, str]] = {}
    """Names that one might expect here, each with the reason why there is no such field."""


class Fault(NamedTuple):
    """What a rule between fields found: where, below the model that has the rule, and what would be right."""

    path: Path
    reason: str
    compared: tuple[Path, ...] = ()
    """The other fields that the rule looked at, below the same model."""


def refuse(model: BaseModel, faults: Iterable[Fault]) -> None:
    """Raise a `ValidationError` with a line for each fault; nothing happens when there is none."""
    errors = [
        InitErrorDetails(
            type=PydanticCustomError(
                RULE, "{reason}", {"reason": fault.reason, "compared": fault.compared, "depth": len(fault.path)}
            ),
            loc=fault.path,
            input=None,
        )
        for fault in faults
    ]
    if errors:
        raise ValidationError.from_exception_data(type(model).__name__, errors)


def exactly_one(model: BaseModel, names: Sequence[str]) -> list[Fault]:
    """The fault of having none of these fields, or several. Names as in Python."""
    given = [to_camel(name) for name in names if getattr(model, name) is not None]
    wanted = " or ".join(to_camel(name) for name in names)
    if not given:
        return [Fault((), f"needs exactly one of {wanted}")]
    return [Fault((name,), f"only one of {wanted} may be given; remove all but one") for name in given[1:]]


def repeated(path: Path, names: Sequence[str], field: str = "") -> list[Fault]:
    """A fault for each name that stands in the list at `path` a second time."""
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    at: Path = (field,) if field else ()
    return [
        Fault((*path, index, *at), f"is '{name}', as in entry {first[name]}; names are unique")
        for index, name in enumerate(names)
        if first[name] != index
    ]


@dataclass(frozen=True)
class Bytes:
    """Marks a `Quantity` as whole bytes, not negative, within these bounds."""

    least: str = "0"
    most: str | None = None

    MAX_CHARACTERS: ClassVar[int] = 20
    """What the API server needs to know to bound the cost of the rules that it evaluates; any size in bytes fits."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        least = Quantity.parse(self.least)
        most = Quantity.parse(self.most or str(MOST))

        def check(value: object, inner: ValidatorFunctionWrapHandler) -> Quantity:
            if isinstance(value, str) and len(value) > self.MAX_CHARACTERS:
                raise ValueError(f"must have at most {self.MAX_CHARACTERS} characters, such as 512Mi or 16Gi")
            quantity: Quantity = inner(value)
            if not quantity.is_whole:
                raise ValueError("must be a whole number of bytes")
            if not least <= quantity <= most:
                raise ValueError(f"must be at least {least}" + (f", at most {most}" if self.most else ""))
            return quantity

        return core_schema.no_info_wrap_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": NOT_NEGATIVE, "maxLength": self.MAX_CHARACTERS}


@dataclass(frozen=True)
class Span:
    """Marks a `Duration` as lying within these bounds."""

    least: str
    most: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        least, most = Duration.parse(self.least), Duration.parse(self.most)

        def check(duration: Duration) -> Duration:
            if not least <= duration <= most:
                raise ValueError(f"must be {least.short} to {most.short}")
            return duration

        return core_schema.no_info_after_validator_function(check, handler(source))


def _not_negative(quantity: Quantity) -> Quantity:
    if quantity.nano < 0:
        raise ValueError("must not be negative")
    return quantity


Integer: TypeAlias = Annotated[int, Strict()]
Number: TypeAlias = Annotated[float, Strict()]
Flag: TypeAlias = Annotated[bool, Strict()]
Amount: TypeAlias = Annotated[Quantity, AfterValidator(_not_negative)]

LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
URL_OR_EMPTY = r"^(https?://[^\s/]+\S*)?$"
NO_BLANKS = r"^\S+$"

IN_WORDS = {
    LABEL: 'lower-case letters, digits and "-", starting with a letter and not ending in "-"',
    SUBDOMAIN: 'lower-case letters, digits, "-" and ".", starting and ending with a letter or digit',
    ENV_NAME: 'letters, digits and "_", not starting with a digit',
    URL_OR_EMPTY: "a URL that starts with http:// or https://, or empty",
    NO_BLANKS: "without blanks",
}
"""What each pattern asks for, for messages."""

Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=253, pattern=SUBDOMAIN)]
"""The name of a Kubernetes object: a Secret, a claim, a class."""
