"""Declaration of options: described fields of a section, with bounds and traits.

    steps: int = option(1000, "Optimizer steps in total.", resumable=True, ge=1)

Code that treats some options differently asks for a trait (`Config.fields_with`) and keeps no list of names.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

Trait = Literal["common", "resumable", "execution", "per_host", "shapes_weights", "exported", "training_only"]
TRAITS: tuple[Trait, ...] = get_args(Trait)


def option(
    default: Any,
    description: str,
    *,
    common: bool = False,
    resumable: bool = False,
    execution: bool = False,
    per_host: bool = False,
    shapes_weights: bool = False,
    exported: bool = False,
    training_only: bool = False,
    former_values: Mapping[str, str] | None = None,
    **constraints: Any,
) -> Any:
    """Declare an option of a section.

    Args:
        default: Value of the option where neither a preset nor an override gives one.
        description: One line with the unit and the meaning of special values; it ends with a period.
        common: Listed by `--help`; the other options are listed by `--help SECTION`.
        resumable: May change when a run is resumed, because no step already taken depends on it.
        execution: Selects how a step is computed, not what: results differ by rounding only. Implies `resumable`.
        per_host: May differ between the processes of a run. Implies `resumable`.
        shapes_weights: The shapes or the meaning of the parameters depend on it, so a run that starts from other
            weights needs their value.
        exported: Part of the architecture that `config.json` of the Hugging Face layout describes.
        training_only: A trained model computes the same whatever its value, so an export does not need it.
        former_values: Values of earlier versions, with the present ones.
        **constraints: Bounds and other arguments of `pydantic.Field`, such as `ge=1`.

    Returns:
        The pydantic field.
    """
    given = {
        "common": common,
        "resumable": resumable or execution or per_host,
        "execution": execution,
        "per_host": per_host,
        "shapes_weights": shapes_weights,
        "exported": exported,
        "training_only": training_only,
    }
    extra: dict[str, Any] = {"traits": [name for name, value in given.items() if value]}
    if former_values:
        extra["former_values"] = dict(former_values)
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def traits_of(field: FieldInfo) -> frozenset[str]:
    """Return the names of the traits of a field."""
    return frozenset(_extra(field).get("traits", ()))


def former_values_of(field: FieldInfo) -> dict[str, str]:
    """Return the present value for each value of a field that only earlier versions had."""
    return _extra(field).get("former_values", {})


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


class Section(BaseModel):
    """A frozen group of options; unknown names are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _replace_former_values(cls, values: Any) -> Any:
        """Accept the values of earlier versions."""
        if not isinstance(values, dict):
            return values
        replaced = dict(values)
        for name, field in cls.model_fields.items():
            former = former_values_of(field)
            value = replaced.get(name)
            if isinstance(value, str) and value in former:
                replaced[name] = former[value]
        return replaced


# Of several strings, a single one may be given without brackets.
one_or_more = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
Strings = Annotated[tuple[str, ...], one_or_more]

# Several whole numbers; a single one may be given without brackets.
Integers = Annotated[tuple[int, ...], BeforeValidator(lambda value: (value,) if isinstance(value, int) else value)]
