"""The page in a real browser: no error, no request, and readable on a phone, on paper, in the dark, and by keyboard."""

import dataclasses
import os

import chromium
import pytest
from synthetic import bare, even, hostile_names, report, wide

from eigenlorax.reports.render import page

CHROMIUM = chromium.find() if os.name == "posix" else None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason=f"needs Chromium: CHROME names it, or one of {', '.join(chromium.NAMES)} is on the PATH",
    ),
]

NAMES = [f"adapter-{n:02d}" for n in range(30)]
PAGES = {
    "3": lambda: report(3),
    "30": lambda: report(30, names=NAMES),
    "1000": lambda: report(1000),
    "wide": lambda: wide(25),
    "bare": lambda: bare(4),
    "even": lambda: even(3),
    "hostile": lambda: report(len(hostile_names()), names=hostile_names(), base_model=hostile_names()[1]),
}
TROUBLE = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening"}

CONTRAST = """(() => {
  const probe = document.createElement("i");
  document.body.append(probe);
  const luminance = (name) => {
    probe.style.color = `var(${name})`;
    const parts = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = {};
  for (const ground of ["--page", "--card", "--soft"])
    for (const ink of ["--text", "--muted", "--accent", "--good", "--bad", "--ink-muted"])
      found[`${ink} on ${ground}`] = contrast(ink, ground) / 4.5;
  for (let n = 0; n < 8; n++) found[`series ${n}`] = contrast(`--ink-series-${n}`, "--card") / 3;
  probe.remove();
  return found;
})()"""

BLOCKED = """new Promise((done) => {
  document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective), { once: true });
  const made = document.createElement("%s");
  Object.assign(made, %s);
  document.body.append(made);
})"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The pages as files, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("pages"), {}

    def path(name):
        if name not in made:
            made[name] = folder / f"{name}.html"
            made[name].write_text(page.render(PAGES[name]()), encoding="utf-8")
        return made[name]

    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.tab(CHROMIUM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def tab(browser):
    browser.emulate()
    return browser


def first(tab, rows=3):
    """The names that the table of adapters shows first."""
    return tab.value(
        "[...document.querySelectorAll('#adapter-table tbody tr:not([hidden]) th')]"
        f".slice(0, {rows}).map((cell) => cell.textContent)"
    )


@pytest.mark.parametrize("name", PAGES)
def test_no_error_and_no_request(tab, files, name):
    tab.open(files(name))
    # what is drawn only when it is scrolled to has had its chance
    tab.value("new Promise((done) => { scrollTo(0, document.body.scrollHeight); setTimeout(done, 100); })")
    assert tab.value("document.querySelectorAll('h1').length") == 1
    assert [event for event in tab.events if event["method"] in TROUBLE] == []
    asked = [
        event["params"]["request"]["url"] for event in tab.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [files(name).resolve().as_uri()]
    resources = tab.value("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [url for url in resources if not url.startswith("data:")] == []


@pytest.mark.parametrize(
    ("tag", "attributes", "directive"),
    [
        ("img", "{ src: 'https://example.com/x.png' }", "img-src"),
        ("script", "{ textContent: 'window.ran = true' }", "script-src-elem"),
        ("script", "{ src: 'https://example.com/x.js' }", "script-src-elem"),
        ("link", "{ rel: 'stylesheet', href: 'https://example.com/x.css' }", "style-src-elem"),
        ("iframe", "{ src: 'https://example.com/' }", "frame-src"),
    ],
)
def test_the_policy_stops_what_would_load_or_run(tab, files, tag, attributes, directive):
    tab.open(files("bare"))
    assert tab.value(BLOCKED % (tag, attributes)) == directive
    assert tab.value("window.ran") is None


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_need_not_scroll_sideways(tab, files, name):
    tab.emulate(width=390, height=844, touch=True)
    tab.open(files(name))
    assert tab.value("document.documentElement.scrollWidth") == 390
    # nor is anything cut off by its box, but what scrolls, and names that end in dots
    cut = tab.value(
        "[...document.querySelectorAll('p, li, dd, h1, h2, figcaption, .tile, .group')]"
        ".filter((one) => one.checkVisibility() && one.getBoundingClientRect().right > 390).map((one) => one.outerHTML)"
    )
    assert cut == []


@pytest.mark.parametrize("name", ["3", "30", "wide", "hostile"])
@pytest.mark.parametrize("width", [1024, 1280, 1440])
def test_every_column_of_every_table_is_seen_at_once(tab, files, name, width):
    tab.emulate(width=width)
    tab.open(files(name))
    tab.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    boxes = tab.value(
        "[...document.querySelectorAll('.scroll')]"
        ".map((one) => [one.ariaLabel, one.checkVisibility(), one.scrollWidth - one.clientWidth])"
    )
    assert {label for label, _, _ in boxes} >= {
        "All modules",
        "Components of all modules",
        "All adapters, the worst first",
        "Bytes and factors of all adapters",
        "Other methods for these adapters",
        "Adapters on their task",
    }
    assert [box for box in boxes if box[1:] != [True, 0]] == []


def test_labels_of_bars_are_whole(tab, files):
    tab.emulate(width=1280)
    label = "the same singular values in random directions, fitted in the same way as these adapters"
    full = report(3)
    baselines = [dataclasses.replace(one, label=label) if one.key == "null" else one for one in full.baselines]
    target = files("3").with_name("long-label.html")
    target.write_text(page.render(dataclasses.replace(full, baselines=baselines)), encoding="utf-8")
    tab.open(target)
    names = tab.value(
        "[...document.querySelectorAll('#baselines .name')].map((one) => [one.textContent, "
        "one.clientWidth - one.scrollWidth, one.clientHeight - one.scrollHeight])"
    )
    assert label in [name for name, *_ in names]
    assert [name for name in names if name[1] < 0 or name[2] < 0] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_small_numbers_are_on_one_line(tab, files, width):
    tab.emulate(width=width)
    tab.open(files("even"))
    found = tab.value(
        "[...document.querySelectorAll('.whole, .value, .said')].filter((one) => one.textContent.includes('e-'))"
        ".map((one) => { const range = document.createRange(); range.selectNodeContents(one);"
        " return [one.className, new Set([...range.getClientRects()].map((box) => box.top)).size]; })"
    )
    assert {shape for shape, _ in found} == {"whole", "value", "said"}
    assert {lines for _, lines in found} == {1}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_their_ground(tab, files, scheme):
    tab.emulate(scheme=scheme)
    tab.open(files("bare"))
    assert {what: share for what, share in tab.value(CONTRAST).items() if share < 1} == {}


def test_the_theme_is_the_systems_or_that_of_the_switch(tab, files):
    ground = "getComputedStyle(document.body).backgroundColor"
    press = "document.querySelector('.theme').click()"
    tab.open(files("bare"))
    light = tab.value(ground)
    tab.emulate(scheme="dark")
    dark = tab.value(ground)
    assert light != dark
    seen = []
    for _ in range(3):
        tab.value(press)
        seen.append((tab.value("document.querySelector('.theme').textContent"), tab.value(ground)))
    assert seen == [("Theme: light", light), ("Theme: dark", dark), ("Theme: as the system", dark)]


def test_the_table_is_sorted_by_its_headings(tab, files):
    full = report(4)
    rows = [
        dataclasses.replace(
            one, name=name, untrained=error is None, delta_error=error or 0.0, nearest_cosine=cosine, overlap=overlap
        )
        for one, (name, error, cosine, overlap) in zip(
            full.adapters,
            [
                ("b10", 0.5, -0.25, 0.99999),
                ("b9", 0.0625, 0.125, 0.25),
                ("a", 1e-5, -0.5, 0.5),
                ("c", None, None, None),
            ],
            strict=True,
        )
    ]
    target = files("bare").with_name("sorted.html")
    target.write_text(page.render(dataclasses.replace(bare(4), adapters=rows)), encoding="utf-8")
    tab.open(target)
    assert first(tab, 4) == ["b10", "b9", "a", "c"]

    def press(heading):
        tab.value(
            "[...document.querySelectorAll('#adapter-table thead button')]"
            f".find((one) => one.textContent === '{heading}').click()"
        )
        return first(tab, 4)

    assert press("cosine") == ["b9", "b10", "a", "c"]
    # what was not measured stays at the end
    assert press("cosine") == ["a", "b10", "b9", "c"]
    assert press("adapter") == ["a", "b9", "b10", "c"]
    assert press("delta error") == ["b10", "b9", "a", "c"]
    assert press("delta error") == ["a", "b9", "b10", "c"]
    # ">0.999" is a number too
    assert press("overlap") == ["b10", "a", "b9", "c"]
    state = "document.querySelector('#adapter-table [aria-sort]')"
    assert tab.value(f"[{state}.textContent, {state}.ariaSort]") == ["overlap", "descending"]


def test_the_table_is_filtered_by_keys_alone(tab, files):
    tab.open(files("30"))
    tab.value("document.querySelector('.filter input').focus()")
    tab.call("Input.insertText", text=" ER-1")
    shown = tab.value(
        "[...document.querySelectorAll('#adapter-table tbody tr')].filter((row) => row.checkVisibility()).length"
    )
    assert shown == 10
    assert tab.value("document.querySelector('.filter span').textContent") == "10 of 30 adapters"


def test_names_are_shown_as_they_are(tab, files):
    tab.open(files("hostile"))
    names = tab.value("[...document.querySelectorAll('#adapter-table tbody th')].map((cell) => cell.textContent)")
    assert sorted(names) == sorted(hostile_names())
    assert tab.value("[document.scripts.length, document.images.length, document.title]") == [
        1, 0, f"12 LoRA adapters of {hostile_names()[1]} · eigenlorax"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["30", "1000"])
def test_paper_is_white_has_all_that_is_folded_and_cuts_nothing(tab, files, name):
    # A4 less its margins, of a system that is dark
    tab.emulate(width=703, media="print", scheme="dark")
    tab.open(files(name))
    tab.value("document.querySelector('.theme').click(), document.querySelector('.theme').click()")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    folded = "document.querySelectorAll('details:not(.more) > :not(summary, .filter)')"
    assert tab.value(f"{folded}.length") > 5
    hidden = f"[...{folded}].filter((one) => !one.checkVisibility({{ contentVisibilityAuto: true }})).length"
    assert tab.value(hidden) == 0
    assert tab.value("document.querySelectorAll('nav, .filter, .theme').length") == 4
    assert (
        tab.value("[...document.querySelectorAll('nav, .filter, .theme')].some((one) => one.checkVisibility())")
        is False
    )
    wide = (
        "[...document.querySelectorAll('table, svg, .bars')].filter((one) => one.getBoundingClientRect().right > 703)"
    )
    assert tab.value(f"{wide}.map((one) => one.outerHTML.slice(0, 80))") == []
    for table in ("adapter-table", "weight-table"):
        rows = f"[...document.querySelectorAll('#{table} tbody tr')]"
        assert tab.value(f"{rows}.filter((row) => row.checkVisibility()).length") == min(int(name), 50)


@pytest.mark.parametrize("name", ["30", "hostile"])
def test_names_on_the_map_hide_neither_names_nor_edges(tab, files, name):
    tab.open(files(name))
    boxes = tab.value(
        "[...document.querySelectorAll('.map [id^=points-name] text')].map((one) => one.getBoundingClientRect())"
        ".map((box) => [box.left, box.top, box.right, box.bottom])"
    )
    assert len(boxes) > 5
    edge = tab.value("(() => { const box = document.querySelector('.map svg').getBoundingClientRect();"
                     "return [box.left, box.top, box.right, box.bottom]; })()")  # fmt: skip
    for place, (left, top, right, bottom) in enumerate(boxes):
        assert edge[0] <= left < right <= edge[2]
        assert edge[1] <= top < bottom <= edge[3]
        for other in boxes[:place]:
            # glyphs, unlike their boxes, leave a pixel or two above and below
            assert left >= other[2] or right <= other[0] or top + 2 >= other[3] or bottom - 2 <= other[1]


def test_without_scripts_the_page_is_all_there(tab, files):
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(files("30"))
        shown = tab.value("document.querySelectorAll('#adapter-table tbody tr').length")
        assert shown == 30
        assert tab.value("document.querySelectorAll('button').length") == 0
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
