"""Expressions of strangers as automata: what `re` finds, they find, and no expression takes longer than it may."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.core import module_patterns
from eigenlorax.core.linear_regex import MAX_DEPTH, LinearRegex, PatternError, StepBudget
from eigenlorax.errors import FormatError
from eigenlorax.formats.lora_config import ScalingConfig

ATOMS = [
    "a",
    "b",
    "0",
    ".",
    "-",
    "_",
    r"\.",
    r"\d",
    r"\w",
    r"\S",
    "[ab]",
    "[^a]",
    "[a-c.]",
    "[]0]",
    r"[\]a]",
    "]",
    "}",
    "{",
]
TIMES = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{2}?", "{,}", "{}", "{a}"]
expressions = st.recursive(
    st.sampled_from([*ATOMS, "^", "$", r"\A", r"\Z", ""]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.builds("({}){}".format, inner, st.sampled_from(["", *TIMES])),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("{}{}".format, st.sampled_from(ATOMS), st.sampled_from(TIMES)),
    ),
    max_leaves=8,
)


@given(expressions, st.lists(st.text("abc.0-_]{}\n", max_size=8), min_size=1, max_size=8))
@example("(a*)*(b|a)+$", ["aab", "aaa\n", "c"])
@example("(|a)*b", ["aab", "b", ""])
@example("(a|ab)(c|bcd)$", ["abcd", "abc", "ac\n"])
def test_fits_what_re_fits(expression, texts):
    try:
        wanted = re.compile(expression)
    except re.error:
        with pytest.raises(PatternError):
            LinearRegex(expression, StepBudget())
        return
    found = LinearRegex(expression, StepBudget())
    for text in texts:
        assert found.matches_start(text) == (wanted.match(text) is not None)


@pytest.mark.parametrize(
    "expression",
    [
        "(",
        ")",
        "a)(",
        "[a",
        "[]",
        "*",
        "a**",
        "{2}a",
        "a|{,3}",
        "a{2}{3}",
        "^*",
        "a{3,2}",
        "(?P<1>a)",
        "\\",
        "[z-a]",
        r"\q",
        "(?:",
    ],
)
def test_what_is_no_expression_is_refused(expression):
    with pytest.raises(re.error):
        re.compile(expression)
    with pytest.raises(PatternError):
        LinearRegex(expression, StepBudget())


@pytest.mark.parametrize(
    "expression", ["(?=a)", "(?!a)b", "(?<=a)b", r"(a)\1", "(?i:a)", r"\ba", "a*+", "(?>a)", "(?#a)b", r"\x41"]
)
def test_what_an_automaton_cannot_do_is_refused(expression):
    with pytest.raises(PatternError, match="not supported|is repeated at"):
        LinearRegex(expression, StepBudget())


HOSTILE = {
    "stars in stars": "(.*)*X",
    "more of them": "((((.*)*)*)*)*X",
    "many stars": ".*" * 400 + "X",
    "alternatives that are one": "(a|a|.|.)*" * 60 + "X",
    "twice as many ways for each": "(a|a)" * 500 + "X",
    "counted in counted": "((a{1,40}){1,40}){1,40}X",
    "nothing, counted": "((){9999999}){9999999}X",
    "many sets of states": "(.*a.{200}){10}X",
    "deep": "(" * 1500 + "a" + ")" * 1500,
    "deeper than the interpreter's stack": "(" * 10**6,
    "long": "(a)" * 10**6,
    "a class that is long": "[" + "ab" * 2000 + "]*X",
}


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_expression_takes_longer_than_it_may(hostile):
    # the slowest takes a second with all steps that there are for a config
    patterns = module_patterns.ModulePatterns({HOSTILE[hostile]: 7}, StepBudget(400_000))
    said = ""
    try:
        for place in range(300):
            assert patterns.value(f"{'a.' * 200}{place}", 3) == 3
    except FormatError as error:
        said = str(error)
    assert re.search("^$|too many steps|more than 4096 states|characters, more than 4,096|more than 40 deep", said)


def test_what_a_text_takes_grows_with_its_length_alone():
    used = []
    for length in (1000, 2000, 4000):
        effort = StepBudget(10**9)
        assert not LinearRegex("(a|b|ab)*(.*)*X", effort).matches_start("ab" * (length // 2))
        used.append(10**9 - effort._left)
    assert used[2] - used[1] == pytest.approx(2 * (used[1] - used[0]), rel=0.01)


def test_groups_may_be_nested_so_deep_and_no_deeper():
    assert LinearRegex("(" * MAX_DEPTH + "a" + ")" * MAX_DEPTH, StepBudget()).matches_start("a")
    with pytest.raises(PatternError, match="nested more than 40 deep"):
        LinearRegex("(" * (MAX_DEPTH + 1) + "a" + ")" * (MAX_DEPTH + 1), StepBudget())


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_as_many_keys_and_modules_as_real_adapters_have_are_matched():
    modules = [f"model.layers.{layer}.{part}" for layer in range(100) for part in ("q", "k", "v", "o", "up", "down")]
    literal = {module.removeprefix("model."): place for place, module in enumerate(modules)}
    regular = {rf"layers\.{layer}\.(q|k|v)": layer for layer in range(100)} | {r"^model\..*\.(up|down)$": 7}
    for patterns, wanted in ((literal, [*range(600)]), (regular, [*([n, n, n, -1, 7, 7] for n in range(100))])):
        found = module_patterns.ModulePatterns(patterns)
        flat = [one for row in wanted for one in (row if isinstance(row, list) else [row])]
        assert [found.value(module, -1) for module in modules] == flat


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_an_error_names_the_config_the_key_and_what_to_do(field):
    config = {"r": 4, field: {"(.*)*X": 8, "(?=x)": 8}}
    with pytest.raises(
        FormatError, match=r"adapters/one: the key '\(\?=x\)' of rank_pattern or alpha_pattern cannot be"
    ):
        ScalingConfig(config, "adapters/one").rank_and_scaling("encoder.query")
    with pytest.raises(FormatError, match=r"takes too many steps. Write full names of modules, such as \^encoder"):
        ScalingConfig({"r": 4, field: {".*" * 100 + "X": 8}}, "adapters/one", StepBudget(999)).rank_and_scaling(
            "a." * 200
        )


@pytest.mark.parametrize("part", [".lora_magnitude_vector", ".lora_A.x", "_lora.down.weight", ".alpha", "lora_unet_"])
def test_names_of_tensors_are_no_longer_than_can_be_looked_through(tmp_path, part):
    # these expressions are our own, and would look through a name again and again
    name = f"x{part * 200_000}.."
    folder = make_adapter(tmp_path / "peft", seed=1, tensors={name: torch.ones(1)})
    save_file({name: torch.ones(1)}, tmp_path / "style.safetensors")
    for source in (folder, tmp_path / "style.safetensors", tmp_path):
        with pytest.raises(
            FormatError, match=r"the name of tensor '[^']{40}'… has \d,\d\d\d,\d\d\d characters; at most 1,024"
        ):
            ex.fit(source, n_components=1)
