"""Pictures of reports in a browser, at three widths, dark and light; fails on what a reader would trip over.

A page fails if it is wider than the window, if a text has a contrast below 4.5 to 1 to what is behind it, if it asks
for anything beyond itself, or if its script reports an error. Needs Chromium on the path, and playwright:

    pip install playwright
    python benchmarks/report_screens.py                                   # trains each method on a tiny model first
    python benchmarks/report_screens.py runs/*/version_0/report.html      # of the demo, of comparisons
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_alignment.tools.parsers import METHODS

WIDTHS = (360, 1280, 2560)
SCHEMES = ("light", "dark")
LEAST_CONTRAST = 4.5

# Texts whose contrast to the ground below them is too low, the lowest first. Grounds that let others through are mixed
# by drawing them on a canvas, which also reads every way of writing a colour.
LOW_CONTRAST = """least => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const drawn = colors => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = rgb => rgb.reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
  const found = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement, text = node.textContent.trim();
    if (!text || !element.checkVisibility() || /^(script|style|title)$/i.test(element.tagName)) continue;
    const ground = [];
    for (let each = element; each; each = each.parentElement) ground.unshift(getComputedStyle(each).backgroundColor);
    ground.unshift('white');
    const style = getComputedStyle(element), color = element instanceof SVGElement ? style.fill : style.color;
    const [low, high] = [light(drawn([...ground, color])), light(drawn(ground))].sort((a, b) => a - b);
    const contrast = (high + .05) / (low + .05);
    const name = `${element.tagName.toLowerCase()}.${element.getAttribute('class') || ''}`;
    if (contrast < least && contrast < (found.get(name)?.[0] ?? least)) found.set(name, [contrast, text.slice(0, 40)]);
  }
  return [...found].map(([name, [value, text]]) => `${value.toFixed(2)} ${name} "${text}"`).sort();
}"""
TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth, end = element => element.getBoundingClientRect().right;
  if (document.documentElement.scrollWidth <= width) return [];
  const wide = [...document.body.querySelectorAll('*')].filter(e => end(e) > width + 1 && !e.closest('.scroll'));
  const name = element => `${element.tagName.toLowerCase()}.${element.getAttribute('class') || ''}`;
  return wide.slice(0, 5).map(e => `${name(e)} ends at ${Math.round(end(e))} of ${width}`);
}"""


def main() -> int:
    """Take the pictures, print what is wrong, and return 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pages", type=Path, nargs="*", help="report.html of runs, or comparisons (default: each method)"
    )
    parser.add_argument("--out", type=Path, default=Path("screens"), help="folder of the pictures (default: screens)")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser (default: that of the path)")
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("playwright is not installed. Run: pip install playwright")
    if options.chromium is None:
        sys.exit("chromium is not on the path. Install it, or give --chromium.")
    options.out.mkdir(parents=True, exist_ok=True)
    pages = options.pages or [*trained(options.out / "runs")]
    wrong = 0
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for page in pages:
            for width in WIDTHS:
                for scheme in SCHEMES:
                    problems = look(browser, page, width, scheme, options.out)
                    wrong += len(problems)
                    for problem in problems:
                        print(f"{page} at {width} px, {scheme}: {problem}")
        browser.close()
    print(f"{len(pages)} pages, {len(WIDTHS) * len(SCHEMES)} pictures each in {options.out}; problems: {wrong}")
    return int(wrong > 0)


def trained(folder: Path) -> Iterator[Path]:
    """Pages of one training by each method, as a new user would have them, and of a comparison of them."""
    folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "lit_alignment"]
    for method in METHODS:
        config, quiet = f"{method}.yaml", ["--trainer.enable_progress_bar", "false"]
        subprocess.run([*program, "init", method, "--model", "tiny"], cwd=folder, check=True)
        if method == "rag":
            subprocess.run([*program, "index", "build", "--config", config], cwd=folder, check=True)
        subprocess.run([*program, "fit", "--config", config, *quiet], cwd=folder, check=True)
        yield folder / f"runs/{method}/version_0/report.html"
    runs = [f"runs/{method}" for method in METHODS]
    subprocess.run([*program, "report", *runs], cwd=folder, check=True)
    yield folder / "comparison.html"


def look(browser: Any, path: Path, width: int, scheme: str, out: Path) -> list[str]:
    """Take a picture of a page; what is wrong with it.

    Args:
        browser: Of playwright.
        path: The page.
        width: Of the window, in CSS pixels.
        scheme: light or dark.
        out: Folder of the pictures.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    own = path.resolve().as_uri()
    page.on("request", lambda asked: asked.url.startswith((own, "data:")) or problems.append(f"asks for {asked.url}"))
    page.on("console", lambda said: said.type == "error" and problems.append(f"console: {said.text}"))
    page.on("pageerror", lambda error: problems.append(f"script: {error}"))
    page.goto(own)
    problems += [f"too wide: {each}" for each in page.evaluate(TOO_WIDE)]
    problems += [f"contrast {each}" for each in page.evaluate(LOW_CONTRAST, LEAST_CONTRAST)]
    name = "-".join(path.resolve().with_suffix("").parts[-3:])
    page.screenshot(path=out / f"{name}-{width}-{scheme}.png", full_page=True)
    context.close()
    return problems


if __name__ == "__main__":
    sys.exit(main())
