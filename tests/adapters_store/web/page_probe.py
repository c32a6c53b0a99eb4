"""Looks at pages in a browser for what must not be on them."""

from __future__ import annotations

from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Response

FAULTS = """() => {
  const faults = [], all = s => [...document.querySelectorAll(s)];
  const name = e => (e.getAttribute("aria-label") || e.textContent || e.getAttribute("alt") || "").trim();
  if (document.documentElement.lang !== "en") faults.push("no language");
  for (const s of ["header", "main", "footer", "h1", "head title"])
    if (all(s).length !== 1) faults.push(`${all(s).length} of ${s}`);
  let level = 0;
  for (const h of all("h1, h2, h3, h4")) {
    if (+h.tagName[1] > level + 1) faults.push(`heading ${h.textContent} skips a level`);
    level = +h.tagName[1];
    if (!h.textContent.trim()) faults.push("empty heading");
  }
  for (const e of all("input, select, textarea"))
    if (!e.labels.length && !e.getAttribute("aria-label")) faults.push(`no label of ${e.id}`);
  for (const e of all("a, button, summary")) if (!name(e)) faults.push(`no name of ${e.outerHTML.slice(0, 80)}`);
  for (const e of all("img")) if (!e.alt) faults.push(`no alt of ${e.src}`);
  for (const e of all("nav, form, [role=region], [role=group]"))
    if (!e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby")) faults.push(`no label of ${e.className}`);
  const navs = all("nav").map(e => e.getAttribute("aria-label"));
  if (new Set(navs).size !== navs.length) faults.push(`navs share a label: ${navs}`);
  const ids = all("[id]").map(e => e.id);
  for (const id of new Set(ids.filter((id, i) => ids.indexOf(id) !== i))) faults.push(`several of id ${id}`);
  for (const e of all("[aria-labelledby], [for], a[href^='#']")) {
    const id = e.getAttribute("aria-labelledby") || e.getAttribute("for") || e.getAttribute("href").slice(1);
    if (!document.getElementById(id)) faults.push(`nothing has the id ${id}`);
  }
  for (const e of all("thead th")) if (e.scope !== "col") faults.push("a column's head without scope");
  for (const e of all("table")) if (!e.closest("[role=region]")) faults.push("a table outside of a region");
  for (const e of all("*")) {
    const style = getComputedStyle(e);
    if (/auto|scroll/.test(style.overflowX) && e.scrollWidth > e.clientWidth && e.tabIndex < 0)
      faults.push(`${e.className} scrolls, but has no focus`);
    if (e.tabIndex > 0) faults.push(`${e.outerHTML.slice(0, 60)} has a tab index`);
    if (e.tagName !== "HTML" && e.hasAttribute("style")) faults.push("a style attribute");
  }
  for (const e of all("ul > *, ol > *")) if (e.tagName !== "LI") faults.push(`${e.tagName} in a list`);
  for (const e of all("a, button, input, select, summary")) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.height < 20 && !e.closest("p, li, td, th, svg, nav")))
      faults.push(`${name(e)} is ${box.height} pixels high`);
  }
  return faults;
}"""
"""What is wrong with a document's structure, as WCAG 2.2 A and AA see it."""

CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = text => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const luminance = c => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const s = c[i] / 255; return sum + weight * (s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = e => {
    for (let at = e; at; at = at.parentElement) {
      if (at.tagName === "g") { const r = at.querySelector("rect"); if (r) return rgba(getComputedStyle(r).fill); }
      const c = rgba(getComputedStyle(at).backgroundColor);
      if (c[3] === 255) return c;
    }
    return rgba("white");
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const field = e.matches("input, select");
    if (!field && ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || style.visibility === "hidden") continue;
    const fronts = [e.tagName === "text" ? style.fill : style.color];
    if (field && e.placeholder) fronts.push(getComputedStyle(e, "::placeholder").color);
    for (const front of fronts) {
      const [a, b] = [luminance(rgba(front)), luminance(behind(e))];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${e.tagName} ${e.textContent.slice(0, 40)}`);
    }
  }
  return found;
}"""
"""Texts whose contrast with what is behind them is below 4.5."""


class Watch:
    """Opens pages of one site and writes down what went wrong.

    Attributes:
        faults: errors in the console, failed requests, and requests to other hosts.
        expected: statuses of answers, and parts of messages, that are no fault.
    """

    def __init__(self, browser: Browser, site: str) -> None:
        self._browser = browser
        self._site = site
        self._contexts: list[BrowserContext] = []
        self.faults: list[str] = []
        self.expected: set[int | str] = set()

    def open(self, path: str, scheme: str = "light", width: int = 1280) -> Page:
        """A page in a window of its own."""
        context = self._browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light",
            viewport={"width": width, "height": 800},
            reduced_motion="reduce",
        )
        context.set_default_timeout(20_000)
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: self.faults.append(f"dialog {dialog.message}"))
        page.on("request", self._asked)
        page.on("requestfailed", self._failed)
        page.on("response", self._answered)
        page.goto(self._site + path, wait_until="load")
        return page

    def close(self) -> None:
        """Close all windows."""
        while self._contexts:
            self._contexts.pop().close()

    def _said(self, message: ConsoleMessage) -> None:
        known = any(str(each) in message.text for each in self.expected)
        if message.type in ("error", "warning") and not known:
            self.faults.append(f"console: {message.text}")

    def _asked(self, request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self._site).netloc:
            self.faults.append(f"asked {request.url}")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # what a page was still loading when it was left
            self.faults.append(f"failed: {request.url}: {request.failure}")

    def _answered(self, response: Response) -> None:
        if response.status >= 400 and response.status not in self.expected:
            self.faults.append(f"{response.status}: {response.url}")
