"""The page of a run: what it shows, that nothing in it is obeyed, and that it needs nothing else."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from lit_alignment.evaluation.samples import Confusion, NotableResponse
from lit_alignment.report.page import confusion_rows, render_run, style
from lit_alignment.report.run import CherryPick, Judge, TrainingRun

HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(1)>"'&\u202e\x00"""
ASKED = [{"role": "user", "content": "2 + 2?"}]


def run(**settings):
    return TrainingRun("SFT", "tiny", ["train"], "sft/version_0", **settings)


class Elements(HTMLParser):
    """Names of elements, and of their attributes with values."""

    def __init__(self, page):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs


def test_newest_answer_stands_beside_the_reference_and_the_first_with_its_differences():
    answers = {0: "dogs", 4: "a black cat sat", 8: "a black cat sat down"}
    pick = CherryPick("d", "1", ASKED, {"reference": "a white cat sat down"}, answers, {0: False, 4: False, 8: True})
    losses = [(4, 1.0), (8, 2.0)]
    page = render_run(run(picks=[pick], curves={"val/loss": losses}, judge=Judge("val/loss")))
    panes = re.findall("<b>(reference|step [0-9])</b>", page)
    assert panes == ["reference", "step 0", "step 4", "step 8"]  # 4 is the best
    newest = page.partition("<b>step 8</b>")[2].partition("</div></div>")[0]
    assert "a<del> white</del><ins> black</ins> cat sat down" in newest and "&#10003; match" in newest
    assert "best step" in page.partition("<b>step 4</b>")[2].partition("<b>step 8</b>")[0]
    assert re.findall("([0-9]) of 1<", page) == ["0", "0", "1"]


def test_answers_between_are_folded():
    pick = CherryPick("d", "1", ASKED, {"reference": "x"}, {step: f"answer {step}" for step in (0, 1, 2, 3)})
    page = render_run(run(picks=[pick]))
    shown, _, folded = page.partition("All 4 steps")
    assert "answer 0" in shown and "answer 3" in shown and "answer 1" not in shown and "answer 2" in folded


def test_text_of_records_is_shown_and_never_obeyed():
    pick = CherryPick(
        HOSTILE,
        HOSTILE,
        [{"role": HOSTILE, "content": HOSTILE}],
        {"reference": HOSTILE, HOSTILE: HOSTILE},
        {0: HOSTILE + "a", 1: HOSTILE},
        {0: True},
        {0: {HOSTILE: 1.0}},
        {0: [HOSTILE]},
    )
    told = {"machine": {HOSTILE: HOSTILE}, "config": f"a: {HOSTILE!r}\nseed_everything: {HOSTILE!r}"}
    split = {"split": HOSTILE, "sources": {}, "examples": 0, "tokens": 0, "trained_tokens": 0, "longest": 0}
    page = render_run(
        TrainingRun(
            HOSTILE,
            HOSTILE,
            [HOSTILE],
            HOSTILE,
            **told,
            curves={f"val/{HOSTILE}": [(1, 1.0), (2, 2.0)]},
            judge=Judge(f"val/{HOSTILE}"),
            picks=[pick],
            right=HOSTILE,
            confusion=Confusion([[1]], [HOSTILE]),
            notable=[NotableResponse(HOSTILE, pick.messages, HOSTILE, {HOSTILE: 1.0}, True)],
            splits=[{**split, "dropped": {HOSTILE: 1}}],
        )
    )
    elements = Elements(page)
    assert elements.found.count("script") == 1 and "img" not in elements.found
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert "\u202e" not in page and "\x00" not in page and page.count("\\u202e") > 10


def test_page_runs_its_own_script_and_style_alone_and_asks_for_nothing():
    page = render_run(run(curves={"val/loss": [(1, 1.0), (2, 2.0)]}))
    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', page.replace("&#39;", "'"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    names = [name for name, value in Elements(page).attributes if not (value or "").startswith("#")]
    assert not {"src", "href", "style"} & set(names) and "url(" not in page and "@import" not in page


def test_picture_of_a_record_is_in_the_page_and_one_that_is_gone_is_named(tmp_path):
    from PIL import Image

    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.png")
    images = [str(tmp_path / "a.png"), str(tmp_path / "gone.png")]
    page = render_run(run(picks=[CherryPick("d", "1", [{"role": "user", "content": "?", "images": images}], {})]))
    assert page.count('src="data:image/png;base64,') == 1 and "gone.png" in page


@pytest.mark.parametrize("classes", [2, 30])
def test_confusion_matrix_has_shares_of_the_true_class(classes):
    counts = [[3 if row == column else 0 for column in range(classes)] for row in range(classes)]
    counts[0][1] = 1
    rows = confusion_rows(Confusion(counts, [f"class {number}" for number in range(classes)]))
    label, cells, total, share = rows[0]
    assert (label, total, share) == ("class 0", 4, 0.75) and rows[1][3] == 1
    assert [(cell.count, cell.share, cell.right) for cell in cells[:2]] == [(3, 0.75, True), (1, 0.25, False)]
    page = render_run(run(confusion=Confusion(counts, [f"class {number}" for number in range(classes)])))
    assert page.count(" taken for ") == classes**2
    assert "class 0 taken for class 1: 1 of 4, 25%" in page


def test_notable_responses_have_their_rewards():
    worst = NotableResponse("worst", ASKED, "5 or <b>", {"reward": 0.125, "reward_short": 0.25}, True)
    part = render_run(run(notable=[worst])).partition("Of the last rollout")[2].partition("<h2")[0]
    assert "5 or &lt;b&gt;" in part and "reward 0.125 &middot; reward_short 0.25" in part and "cut at the limit" in part
    assert "last rollout" not in render_run(run())


def luminance(color):
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_grounds(scheme):
    light, _, rest = style().partition("@media (prefers-color-scheme: dark)")
    colors = dict(
        re.findall("--([a-z0-9-]+): (#[0-9a-f]{6})", light if scheme == "light" else rest.partition("} }")[0])
    )
    texts = [(text, ground) for text in ("ink", "dim") for ground in ("ground", "surface", "soft")]
    texts += [(each, f"{each}-soft") for each in ("accent", "good", "bad")]
    texts += [("accent", "surface"), ("bad", "soft"), ("ink", "accent-soft"), ("surface", "ink")]
    assert not [pair for pair in texts if contrast(*(colors[name] for name in pair)) < 4.5]
    assert all(contrast(colors[f"c{number}"], colors["surface"]) >= 3 for number in range(8))
