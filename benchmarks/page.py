"""The live page: its weight, and the time to the first useful view, in headless Chromium.

    python -m benchmarks.page [--url http://127.0.0.1:8000] [--runs 9]

Useful: every group of the fleet is in the table and the heat map has its cells. Each run is a new
browser context with an empty cache, so everything is loaded again; times are the page's own clock
from the start of its navigation. Without --url a deployment of --model is started. The browser is
the machine's own (CHROMIUM, or chromium on the PATH); it needs `pip install playwright`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.report import finish, table
from benchmarks.serving import Server

_USEFUL = """() => {
  const rows = document.querySelectorAll('#fleet .state').length;
  const cells = document.querySelectorAll('#heat [role=gridcell]').length;
  if (!rows || !cells) return null;
  const paint = performance.getEntriesByName('first-contentful-paint')[0];
  return {useful_ms: performance.now(), paint_ms: paint ? paint.startTime : 0};
}"""


@contextlib.contextmanager
def deployment(url: str | None, model: str, groups: int) -> Iterator[str]:
    """The URL of a deployment that runs, or of one of our own."""
    if url is not None:
        yield url.rstrip("/")
        return
    server = Server(model, groups, 1, None)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.stop()


def load(browser: Any, url: str) -> dict[str, float]:
    """One load of the page from nothing: times in ms, bytes of what came before it was useful."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        files: list[int] = []

        def came(response: Any) -> None:
            if not response.url.partition("?")[0].endswith("/ui/events"):
                files.append(int(response.headers.get("content-length", 0)))

        page.on("response", came)
        page.goto(url + "/ui", wait_until="commit")
        seen = page.wait_for_function(_USEFUL, timeout=30_000, polling="raf").json_value()
        return {**seen, "files": len(files), "bytes": sum(files)}
    finally:
        context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a deployment that runs")
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        raise SystemExit("no Chromium here: apt-get install chromium, or set CHROMIUM")
    with deployment(args.url, args.model, args.groups) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        load(browser, url)  # the browser itself is warm then
        runs = [load(browser, url) for _ in range(args.runs)]
        browser.close()
    results = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    results["useful_ms_most"] = max(run["useful_ms"] for run in runs)
    print(table(list(results), [[round(value, 1) for value in results.values()]]))
    finish("page", vars(args), results)


if __name__ == "__main__":
    main()
