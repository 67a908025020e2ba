"""The shell of every HTML page: one file, which loads nothing and runs only its own script."""

import base64
import hashlib
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --paper: #fff;
  --first: #0d74ce; --second: #ab6400; --mark: #ce2c31; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --line: #363a3f; --paper: #111113;
    --first: #70b8ff; --second: #ffca16; --mark: #ff9592; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
p, figcaption { color: var(--soft); max-width: 48rem; }
figure { margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 1.2rem 0.2rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); }
"""


def page(title: str, body: str, script: str = "", style: str = "") -> str:
    """Return a whole HTML page.

    Its policy names script and style by their hashes and lets pictures come from the page itself
    only: no request leaves the page, and markup that slipped into `body` can run nothing.

    Args:
        title: Plain text.
        body: HTML; whatever came from outside must have gone through `html.escape`.
        script: JavaScript, run once the body is there.
        style: CSS, beside that of all pages.
    """
    style = _STYLE + style
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'"
    if script:
        assert "</script" not in script.lower()
        policy += f"; script-src '{_hash(script)}'"
    policy += "; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    """Return what the policy calls an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
