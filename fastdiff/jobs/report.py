"""The report of a job: one HTML page without other files."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastdiff.images import RECIPE_KEY
from fastdiff.jobs.shards import Item, Shards
from fastdiff.jobs.spec import JobSpec
from fastdiff.memory import gib

if TYPE_CHECKING:
    from fastdiff.jobs.run import Status

NAME = "report.html"
SHOWN, THUMBNAIL, ERRORS = 48, 160, 200
"""Images of the contact sheet, their longest side in pixels, and rows of the table of errors."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #26262a; background: #fafaf8 }
h1, h2 { font-weight: 600 } table { border-collapse: collapse }
td, th { border-top: 1px solid #d8d8d2; padding: .3rem 1rem .3rem 0; text-align: left;
         vertical-align: top } th { font-weight: 500 }
.sheet { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0 }
figcaption { font-size: 12px; color: #77777f; max-width: 160px; overflow-wrap: anywhere }
img { image-rendering: pixelated; min-width: 64px } pre { overflow-x: auto; font-size: 13px }
"""


def write_report(spec: JobSpec, shards: Shards, status: Status, fingerprint: dict[str, Any]) -> str:
    """Write OUT/report.html, about all shards that are finished. Returns its path or URL.

    Raises:
        OSError: the disk is full.
    """
    finished, records, errors = [*shards.finished()], list[dict[str, Any]](), 0
    rows = sum(len(shards.range(number)) for number in finished)
    for number in finished:
        found = shards.errors(number)
        errors += len(found)
        records += found[: ERRORS - len(records)]
    facts = [
        ("images", f"{rows - errors:,} of {shards.rows:,} rows"),
        ("rows without an image", f"{errors:,}"),
        ("shards", f"{len(finished):,} of {len(shards):,}, {spec.format}, {spec.image}"),
        ("last run", f"{status.made:,} images in {status.seconds:,.1f} s"),
        ("rate of the last run", f"{status.rate:,.2f} images/s"),
        ("slots", f"{status.slots:,}"),
        ("memory", gib(status.memory)),
        ("model", f"{fingerprint['model']}, weights {fingerprint['weights'][:12]}"),
        ("rows from", spec.rows),
    ]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{_text(spec.out.name)}: {rows - errors:,} images</title><style>{STYLE}</style>",
        f"<h1>{rows - errors:,} images</h1>",
        _table([(f"<th>{_text(name)}</th>", _text(value)) for name, value in facts]),
        "<h2>Samples</h2><div class='sheet'>",
        *_figures(shards, finished),
        "</div>",
    ]
    if errors:
        parts.append(f"<h2>Rows without an image</h2><p>{errors:,} rows; the files ")
        parts.append("<code>*.errors.jsonl</code> have all of them.</p>")
        parts.append(
            _table(
                [
                    (f"<th>{record['row']:,}</th>", f"{_text(record['error'])}<br><code>"
                     f"{_text(record['input'])}</code>")
                    for record in records
                ]
            )
        )  # fmt: skip
    settings = json.dumps(fingerprint, indent=2, ensure_ascii=False)
    parts.append(f"<h2>Settings</h2><pre>{_text(settings)}</pre></html>")
    shards.store.write(NAME, ("\n".join(parts) + "\n").encode())
    place = shards.store.place
    return f"{place}/{NAME}" if shards.store.folder is None else str(Path(place, NAME))


def _text(value: str) -> str:
    return html.escape(str(value).encode(errors="backslashreplace").decode())


def _table(rows: list[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr>{a}<td>{b}</td></tr>" for a, b in rows) + "</table>"


def _figures(shards: Shards, finished: list[int]) -> Iterator[str]:
    """Images spread evenly over the finished shards."""
    for item in _spread(shards, finished):
        with Image.open(io.BytesIO(item.image)) as picture:
            recipe = json.loads(item.recipe or picture.info[RECIPE_KEY])
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            file = io.BytesIO()
            picture.save(file, "PNG")
        job = recipe["job"]
        said = job.get("prompt") or recipe.get("class_name") or job.get("label")
        caption = f"row {item.row:,}" + ("" if said is None else f": {str(said)[:80]}")
        data = base64.b64encode(file.getvalue()).decode()
        yield (
            f"<figure><img alt='' src='data:image/png;base64,{data}'>"
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )


def _spread(shards: Shards, finished: list[int]) -> Iterator[Item]:
    if not finished:
        return
    count = min(len(finished), SHOWN)
    chosen = [finished[at * len(finished) // count] for at in range(count)]
    each = SHOWN // count
    for number in chosen:
        rows = shards.range(number)
        step = max(len(rows) // each, 1)
        wanted = set(rows[::step][:each])
        for item in shards.read(number):
            if item.row in wanted:
                yield item
