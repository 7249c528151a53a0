"""OpenAI's attribute filters: what passes, and what is refused."""

import pytest

from actors.errors import InvalidRequest
from actors.policies.filters import parse_filter

ATTRIBUTES = {"lang": "en", "year": 2024, "share": 0.5, "draft": False, "date": "2024-05-01"}


def compare(kind, key, value):
    return {"type": kind, "key": key, "value": value}


@pytest.mark.parametrize(
    ("raw", "passes"),
    [
        (None, True),
        (compare("eq", "lang", "en"), True),
        (compare("eq", "lang", "de"), False),
        (compare("eq", "year", 2024.0), True),
        (compare("eq", "draft", value=False), True),
        (compare("eq", "draft", 0), False),  # a boolean is no number
        (compare("eq", "year", "2024"), False),
        (compare("ne", "lang", "de"), True),
        (compare("ne", "lang", "en"), False),
        (compare("gt", "year", 2023), True),
        (compare("gt", "year", 2024), False),
        (compare("gte", "year", 2024), True),
        (compare("lt", "share", 1), True),
        (compare("lte", "share", 0.4), False),
        (compare("gt", "date", "2024-04-30"), True),
        (compare("gt", "date", 5), False),  # unordered
        (compare("in", "lang", ["de", "en"]), True),
        (compare("in", "year", [1, 2]), False),
        (compare("nin", "lang", ["de"]), True),
        (compare("nin", "lang", ["en"]), False),
        # an attribute that a file does not have is unequal to everything, and nothing else
        (compare("eq", "none", "x"), False),
        (compare("ne", "none", "x"), True),
        (compare("lt", "none", 1), False),
        (compare("in", "none", ["x"]), False),
        (compare("nin", "none", ["x"]), True),
        ({"type": "and", "filters": [compare("eq", "lang", "en"), compare("gt", "year", 2000)]}, True),
        ({"type": "and", "filters": [compare("eq", "lang", "en"), compare("gt", "year", 3000)]}, False),
        ({"type": "or", "filters": [compare("eq", "lang", "de"), compare("gt", "year", 2000)]}, True),
        (
            {
                "type": "or",
                "filters": [
                    compare("eq", "lang", "de"),
                    {
                        "type": "and",
                        "filters": [compare("eq", "draft", value=True), compare("eq", "lang", "en")],
                    },
                ],
            },
            False,
        ),
    ],
)
def test_a_filter_decides(raw, passes):
    assert parse_filter(raw)(ATTRIBUTES) is passes


def nested(depth):
    inner = compare("eq", "lang", "en")
    for _ in range(depth):
        inner = {"type": "and", "filters": [inner]}
    return inner


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        ({"type": "like", "key": "a", "value": 1}, "filters.type", "eq, ne, gt, gte, lt, lte, in, nin, and, or"),
        ({"key": "a", "value": 1}, "filters.type", "eq, ne"),
        ({"type": ["eq"], "key": "a", "value": 1}, "filters.type", "one of"),
        ("lang = en", "filters", "object"),
        ({"type": "eq", "value": 1}, "filters.key", "name of an attribute"),
        ({"type": "eq", "key": "", "value": 1}, "filters.key", "name of an attribute"),
        ({"type": "eq", "key": "a"}, "filters.value", "string, a number or a boolean"),
        ({"type": "eq", "key": "a", "value": None}, "filters.value", "string, a number or a boolean"),
        ({"type": "eq", "key": "a", "value": [1]}, "filters.value", "string, a number or a boolean"),
        ({"type": "in", "key": "a", "value": "x"}, "filters.value", "list"),
        ({"type": "in", "key": "a", "value": []}, "filters.value", "1 to"),
        ({"type": "in", "key": "a", "value": [1, {}]}, "filters.value[1]", "string"),
        ({"type": "eq", "key": "a", "value": 1, "property": "b"}, "filters.property", "type, key, value"),
        ({"type": "and", "filters": []}, "filters.filters", "1 to"),
        ({"type": "and", "key": "a", "filters": [compare("eq", "a", 1)]}, "filters.key", "type, filters"),
        (
            {"type": "and", "filters": [compare("eq", "a", 1), {"type": "or", "filters": [{"type": "x"}]}]},
            "filters.filters[1].filters[0].type",
            "one of",
        ),
    ],
)  # fmt: skip
def test_a_malformed_filter_is_refused_with_its_place_and_what_is_allowed(raw, param, says):
    with pytest.raises(InvalidRequest, match=says) as refused:
        parse_filter(raw)
    assert refused.value.param == param


def test_nesting_is_bounded():
    assert parse_filter(nested(7))(ATTRIBUTES)
    with pytest.raises(InvalidRequest, match="nested"):
        parse_filter(nested(8))
