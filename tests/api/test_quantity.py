"""Quantities as Kubernetes reads and prints them. The golden pairs were made by k8s.io/apimachinery v0.34.1."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from kvpool.api.quantity import MOST, NANO, Notation, Quantity

CANONICAL = {
    "0": "0", "0Gi": "0", "0.0": "0", "-0": "0", "0e9": "0", "00": "0", "007": "7", "1.0": "1", "5.": "5", ".5": "500m",
    "+5": "5", "-5": "-5", "100": "100", "1000": "1k", "1024": "1024", "1023": "1023", "1k": "1k", "1Ki": "1Ki",
    "1000Ki": "1000Ki", "1023Ki": "1023Ki", "1024Ki": "1Mi", "1000000Ki": "1000000Ki", "2048Mi": "2Gi", "1.5Ki": "1536",
    "1.5Mi": "1536Ki", "1.5Gi": "1536Mi", "0.5Gi": "512Mi", "0.3Gi": "322122547200m", "0.001Gi": "1073741824m",
    "-1.5Gi": "-1536Mi", "16Gi": "16Gi", "160Mi": "160Mi", "1Ti": "1Ti", "1Pi": "1Pi", "7Ei": "7Ei", "8E": "8E",
    "1T": "1T", "1.5G": "1500M", "1.5E": "1500P", "1E": "1E", "0.1": "100m", "1.25": "1250m", "500m": "500m",
    "1000m": "1", "1500m": "1500m", "-500m": "-500m", "100u": "100u", "1000u": "1m", "2n": "2n", "0.000000001": "1n",
    "1024.5": "1024500m", "1e3": "1e3", "1E3": "1e3", "1e+3": "1e3", "1e-3": "1e-3", "1e4": "10e3", "1e5": "100e3",
    "1e6": "1e6", "1e18": "1e18", "12e2": "1200", "15e-1": "1500e-3", "1234567": "1234567",
    "123456789012345678": "123456789012345678", "9007199254740993": "9007199254740993", str(MOST): str(MOST),
}  # fmt: skip
NOT_QUANTITIES = [
    "", "abc", "1 Gi", " 1Gi", "1Gi ", "1Gi\n", "16gi", "16GB", "16Gib", "1K", "1ki", "--5", "1e",
    "1e1.5", "0x10", "1_000", "1,5", "1.2.3", "Inf", "NaN", "\uff11",
]  # fmt: skip
SUFFIXES = [
    "",
    "n",
    "u",
    "m",
    "k",
    "M",
    "G",
    "T",
    "P",
    "E",
    "Ki",
    "Mi",
    "Gi",
    "Ti",
    "Pi",
    "Ei",
    "e-3",
    "e0",
    "E2",
    "e+6",
]

numbers = st.builds(Quantity, st.integers(-MOST * NANO, MOST * NANO), st.sampled_from(Notation))
texts = st.builds(
    "{}{}{}".format,
    st.integers(-(10**12), 10**12),
    st.sampled_from(["", ".", ".5", ".25", ".125"]),
    st.sampled_from(SUFFIXES),
)


@pytest.mark.parametrize(("written", "canonical"), CANONICAL.items())
def test_the_canonical_form_is_that_of_kubernetes(written: str, canonical: str) -> None:
    assert str(Quantity.parse(written)) == canonical


@pytest.mark.parametrize("text", NOT_QUANTITIES)
def test_what_kubernetes_does_not_read_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="512Mi"):
        Quantity.parse(text)


@pytest.mark.parametrize("text", ["Gi", "-Gi", ".", "-", "+.k"])
def test_a_number_without_digits_is_refused_though_kubernetes_takes_it_for_0(text: str) -> None:
    with pytest.raises(ValueError, match="512Mi"):
        Quantity.parse(text)


@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "10Ei", str(MOST + 1), "0.1n", "1e-10"])
def test_what_kubernetes_would_round_or_cap_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"2\^63-1"):
        Quantity.parse(text)


@given(numbers)
@example(Quantity(MOST * NANO, Notation.BINARY))
@example(Quantity(-1, Notation.EXPONENT))
def test_what_is_printed_reads_back_as_the_same_number(quantity: Quantity) -> None:
    assert Quantity.parse(str(quantity)) == quantity


@given(texts)
def test_printing_is_canonical_so_that_printing_again_changes_nothing(text: str) -> None:
    try:
        once = str(Quantity.parse(text))
    except ValueError:
        return  # above 2^63-1, or finer than 1n
    assert str(Quantity.parse(once)) == once
    assert "." not in once


@given(st.integers(0, MOST))
def test_a_number_of_bytes_is_printed_exactly(nbytes: int) -> None:
    assert Quantity.of_bytes(nbytes).value == Quantity.parse(str(Quantity.of_bytes(nbytes))).value == nbytes


def test_equality_and_order_are_those_of_the_numbers() -> None:
    assert Quantity.parse("1Gi") == Quantity.parse("1073741824") == Quantity.parse("1024Mi")
    assert hash(Quantity.parse("1k")) == hash(Quantity.parse("1e3"))
    assert Quantity.parse("1G") < Quantity.parse("1Gi")


def test_a_fraction_has_no_value_as_an_integer() -> None:
    with pytest.raises(ValueError, match="500m is not a whole number"):
        _ = Quantity.parse("0.5").value


@pytest.mark.parametrize(("value", "printed"), [(1024, "1024"), (0.5, "500m"), (1e3, "1k"), ("2Gi", "2Gi")])
def test_models_take_yaml_numbers_as_kubernetes_takes_json_numbers(value: object, printed: str) -> None:
    quantity = TypeAdapter(Quantity).validate_python(value)
    assert TypeAdapter(Quantity).dump_json(quantity) == f'"{printed}"'.encode()


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}, float("inf"), float("nan")])
def test_models_take_nothing_else(value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Quantity).validate_python(value)
