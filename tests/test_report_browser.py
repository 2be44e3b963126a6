"""The page in a real browser: on a laptop and a phone, light and dark."""

import itertools
import json

import pytest

from deltal_jax.report.page import write_page
from tests.browser import CHROMIUM, browser
from tests.test_report import PLOTS, fill_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

#: Folded parts are opened, since what is folded has no size.
MEASURE = """(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const box = e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.right, r.bottom] };
  const all = (s, of = document) => [...of.querySelectorAll(s)];
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const colour = name => {
    const probe = document.createElement('i');
    probe.style.color = `var(--${name})`; document.body.append(probe);
    const found = rgb(getComputedStyle(probe).color); probe.remove(); return found.slice(0, 3);
  };
  const names = ['bg', 'card', 'ink', 'soft', 'c0', 'c1', 'c2', 'c3', 'c4', 'c5'];
  const page = document.documentElement;
  return {
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    width: [page.scrollWidth, page.clientWidth, innerWidth],
    plots: all('svg').map(box),
    legends: all('figure ul').map(ul => all('li', ul).map(box)),
    words: all('figure').map(f => all('svg text', f).map(box)),
    wide: all('body *').filter(e => !e.closest('.scroll') && !e.closest('svg'))
      .filter(e => e.getBoundingClientRect().right > page.clientWidth + 0.5).map(e => e.outerHTML),
    colours: Object.fromEntries(names.map(n => [n, colour(n)])),
    background: rgb(getComputedStyle(document.body).backgroundColor).slice(0, 3),
    heat: all('.heat td div').map(e => [rgb(getComputedStyle(e).backgroundColor),
                                        rgb(getComputedStyle(e).color)]),
  };
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a run that has everything, and that of two such runs together."""
    folder = tmp_path_factory.mktemp("shown")
    for name, alpha in (("a", "0.75"), ("b", "1.0")):
        (folder / name).mkdir()
        fill_run(folder / name)
        config = folder / name / "config.yaml"
        config.write_text(config.read_text().replace("alpha: 0.75", f"alpha: {alpha}"))
    one = write_page([folder / "a"], folder / "one.html")
    return {"one": one, "two": write_page([folder / "a", folder / "b"], folder / "two.html")}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def luminance(colour: list[float]) -> float:
    parts = [c / 255 for c in colour[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: list[float], other: list[float]) -> float:
    """As WCAG 2 has it, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def over(front: list[float], back: list[float]) -> list[float]:
    """A colour with an alpha, on another."""
    share = front[3] / 255
    return [share * f + (1 - share) * b for f, b in zip(front[:3], back, strict=True)]


def overlap(boxes: list[list[float]]) -> list:
    """Pairs that share more than a pixel."""
    return [
        (a, b)
        for a, b in itertools.combinations(boxes, 2)
        if min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1
    ]


SIZES = {"phone": (390, 844), "laptop": (1440, 900)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["one", "two"])
def test_the_page_can_be_read(pages, chromium, which, size, scheme):
    width, height = SIZES[size]
    chromium.open(pages[which], width, height, scheme)
    found = chromium.evaluate(MEASURE)
    assert chromium.requests() == [pages[which].resolve().as_uri()]  # and nothing else
    assert chromium.complaints() == []
    assert found["dark"] is (scheme == "dark")
    scrolled, client, inner = found["width"]
    assert scrolled <= client == inner == width and not found["wide"]
    assert len(found["plots"]) >= len(PLOTS)
    assert all(right - x > 200 and bottom - y > 100 for x, y, right, bottom in found["plots"])
    for boxes in (*found["legends"], *found["words"]):
        assert not overlap(boxes), json.dumps(overlap(boxes))
    colours = found["colours"]
    assert found["background"] == colours["bg"]
    for name, back in itertools.product(colours.keys() - {"bg", "card"}, ("bg", "card")):
        assert contrast(colours[name], colours[back]) >= 4.5, (name, back)
    assert found["heat"]
    for back, front in found["heat"]:
        assert contrast(front, over(back, colours["bg"])) >= 4.5
