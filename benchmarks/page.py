"""A picture of the page that people show each other: ``docs/page.png`` of a comparison that was kept as JSON.

    python -m benchmarks.choosing --comparison build/comparison.json
    python -m benchmarks.page build/comparison.json docs/choosing.json

The second file is a choice as JSON, or none; of docs/choosing.json, which holds answers, the first is shown. A
comparison of another model comes from ``octavo compare MODEL --save``.

Needs Chromium on the path (``apt-get install chromium``). The page itself is left beside the picture's source.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from octavo.analysis.choice import Choice
from octavo.analysis.comparison import Comparison
from octavo.report.comparison import page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def picture(html: Path, png: Path, width: int, height: int) -> None:
    """What a window of that size shows of a page, in twice as many dots."""
    binary = next((found for name in NAMES if (found := shutil.which(name))), None)
    if binary is None:
        raise SystemExit("there is no Chromium on the path: apt-get install chromium")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=2")
    with tempfile.TemporaryDirectory() as profile:
        shot = (f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={png.absolute()}")
        subprocess.run([binary, *flags, *shot, html.absolute().as_uri()], check=True, capture_output=True, timeout=120)


def main() -> None:
    """Read, write the page, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("choice", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("docs/page.png"))
    parser.add_argument("--size", type=int, nargs=2, default=(1100, 1330), metavar=("WIDTH", "HEIGHT"))
    given = parser.parse_args()
    compared = Comparison.from_json(json.loads(given.comparison.read_text(encoding="utf-8")))
    choice = None
    if given.choice is not None:
        content = json.loads(given.choice.read_text(encoding="utf-8"))
        choice = Choice.from_json(content["answers"][0]["choice"] if "answers" in content else content)
    html = given.comparison.with_suffix(".html")
    html.write_bytes(page(compared, choice))
    picture(html, given.out, *given.size)
    print(f"{html} and {given.out} are written")


if __name__ == "__main__":
    main()
