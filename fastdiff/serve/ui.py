"""A page to try a model in: `fastdiff ui`, with Gradio in front of the server's worker.

Every visitor's image is a request of its own to the worker, which steps all of them in one batch,
so what one visitor sets never reaches another's image. History is kept per browser session.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.diffusion.samplers import SAMPLERS
from fastdiff.extras import import_extra
from fastdiff.generate.facts import Facts, resolved
from fastdiff.generate.job import CHECKPOINT, SampleSettings
from fastdiff.generate.pictures import read_picture
from fastdiff.generate.webui import to_parameters
from fastdiff.images import png_info, to_pil
from fastdiff.serve.errors import ApiError, wrong
from fastdiff.serve.limits import MIB, Limits
from fastdiff.serve.live import live, read_form
from fastdiff.serve.worker import Partial, Worker

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
gr = import_extra("gradio", extra="ui")

NEW, REPAINT, CHANGE = "a new image", "repaint what is brushed", "start from the picture"
"""What the picture is for."""
CANVAS = 512
"""Sides of the canvas for brushes, in pixels, about; models of small images get whole multiples."""
HISTORY = 24
"""Most images that a session keeps."""
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
.pixelated img {image-rendering: pixelated}
#image img {width: 100%; height: 100%; object-fit: contain}
#history .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr)) !important}
"""


@dataclass(frozen=True, eq=False)
class Drawing:
    """What is on the canvas, at the size of the model's images."""

    image: Image.Image
    """RGB: the picture with what was painted on it."""
    picture: Image.Image
    """RGB: the picture without it."""
    mask: Tensor
    """(1, H, W), 1 where something was painted."""


def read_drawing(value: Mapping[str, Any] | None, side: int) -> Drawing | None:
    """The value of the editor, from its canvas of a multiple of `side`; None if it is empty.

    value: RGBA images "background" and "composite", and a list of them, "layers".
    """
    if value is None or value.get("composite") is None:
        return None
    composite, background = value["composite"], value.get("background")
    painted = torch.zeros(1, side, side)
    for layer in value.get("layers") or ():
        alpha = layer.convert("RGBA").getchannel("A").resize((side, side), Image.Resampling.BOX)
        painted = torch.maximum(painted, torch.from_numpy(np.array(alpha)).gt(0).float())
    if background is None and not painted.any():
        return None
    pictures = [
        _on_white(image, side) if image is not None else Image.new("RGB", (side, side), "white")
        for image in (composite, background)
    ]
    return Drawing(image=pictures[0], picture=pictures[1], mask=painted)


def _on_white(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB").resize((side, side), Image.Resampling.BOX)


def pictured(facts: Facts, use: str, drawing: Drawing | None) -> dict[str, Tensor]:
    """The image and the mask of a request.

    Raises:
        ApiError: there is no drawing, or nothing was brushed to be repainted.
    """
    if use == NEW:
        return {}
    if drawing is None:
        raise wrong("the canvas is empty; open a picture or draw one", "image", code="missing")
    if use == CHANGE:
        return {"image": read_picture(drawing.image, facts.image_channels, None, None)}
    if not drawing.mask.any():
        message = "nothing is brushed; brush over the part of the picture to repaint"
        raise wrong(message, "mask", code="missing")
    image = read_picture(drawing.picture, facts.image_channels, None, None)
    return {"image": image, "mask": drawing.mask}


class Page:
    """The page of one model.

    Attributes:
        blocks: Gradio's app.
    """

    def __init__(self, worker: Worker, limits: Limits, name: str) -> None:
        self.worker, self.limits, self.name = worker, limits, name
        self.facts = worker.facts
        self.side = self.facts.image_size or 64 * self.facts.factor
        self.canvas = self.side * max(1, round(CANVAS / self.side))
        self._folder = tempfile.TemporaryDirectory(prefix="fastdiff-ui-")
        options = {"analytics_enabled": False, "delete_cache": (3600, 86400)}  # seconds
        with gr.Blocks(title=f"fastdiff: {name}", **options) as self.blocks:
            self._build()

    def close(self) -> None:
        """End the page and delete its files."""
        self.blocks.close(verbose=False)
        self._folder.cleanup()

    # What is shown

    def _build(self) -> None:
        gr.Markdown(f"## {self.name}\n{self.about()}")
        with gr.Row():
            with gr.Column(scale=3):
                fields = self._fields()
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="start")
                    stop = gr.Button("Stop", elem_id="stop")
                use, editor, strength = self._canvas()
            with gr.Column(scale=2):
                small = ["pixelated"] if self.side <= CANVAS // 2 else []
                shown = gr.Image(
                    label="Image", elem_id="image", elem_classes=small, format="png",
                    interactive=False, height=420, buttons=["download", "fullscreen"],
                )  # fmt: skip
                status = gr.Markdown("Ready.", elem_id="status")
                gallery = gr.Gallery(
                    label="History", elem_id="history", elem_classes=small, columns=3, height=260,
                    format="png", interactive=False, buttons=["download", "fullscreen"],
                )  # fmt: skip
                with gr.Accordion("Recipe", open=False):
                    recipe = gr.Code(language="json", interactive=False, elem_id="recipe")
                again = gr.Button("Use these settings again", elem_id="again")
        made, chosen = gr.State([]), gr.State(None)  # of this session
        names = list(fields)

        async def run(past: Any, what: str, drawn: Any, part: float, *values: Any) -> Any:
            given = dict(zip(names, values, strict=True))
            given["strength"] = None if what == NEW else part
            async for found in self.run(given, what, drawn, past):
                yield found

        event = gr.on(
            [start.click, *([fields["prompt"].submit] if self.facts.reads_text else [])],
            run,
            inputs=[made, use, editor, strength, *fields.values()],
            outputs=[shown, status, gallery, recipe, made, chosen],
            concurrency_limit=None,
            show_progress="hidden",
            api_name="generate",
        )
        stop.click(lambda: "Stopped.", outputs=status, cancels=[event], api_visibility="private")

        def select(past: list[dict[str, Any]], at: gr.SelectData) -> Any:  # type: ignore[name-defined]
            return _as_text(past[at.index]["recipe"]), at.index, past[at.index]["image"]

        def restore(past: list[dict[str, Any]], index: int | None) -> Any:
            if not past:
                raise gr.Error("there is no image yet; generate one first", print_exception=False)
            return [past[index or 0]["values"].get(name) for name in names]

        private = {"api_visibility": "private"}
        gallery.select(select, inputs=made, outputs=[recipe, chosen, shown], **private)
        again.click(restore, inputs=[made, chosen], outputs=[*fields.values()], **private)

    def _fields(self) -> dict[str, Any]:
        """Field of a request -> its component."""
        facts, given = self.facts, resolved(SampleSettings(), self.facts)
        found: dict[str, Any] = {}
        if facts.reads_text:
            found["prompt"] = gr.Textbox(label="Prompt", elem_id="prompt", autofocus=True, lines=1)
            found["negative_prompt"] = gr.Textbox(label="Not in the image", lines=1)
        elif (count := facts.label_classes) is not None:
            names = list(facts.class_names) or [str(label) for label in range(count)]
            choices = [*names, ("no class", "")] if facts.null_class else names
            found["prompt"] = gr.Dropdown(choices, value=names[0], label="Class", elem_id="prompt")
        samplers = [("the checkpoint's", CHECKPOINT)] if facts.names_sampler else []
        with gr.Row():
            found["sampler"] = gr.Dropdown(
                [*samplers, *sorted(SAMPLERS)], value=given.sampler, label="Sampler",
                elem_id="sampler",
            )  # fmt: skip
            found["num_inference_steps"] = gr.Slider(
                1, self.limits.steps, value=given.steps, step=1, label="Steps", elem_id="steps"
            )
        with gr.Row():
            if facts.reads_text or facts.null_class:
                found["guidance_scale"] = gr.Slider(
                    1, 20, value=given.guidance_scale, step=0.1, label="Guidance", elem_id="scale"
                )
            found["seed"] = gr.Textbox(
                label="Seed", placeholder="another each time", max_lines=1, elem_id="seed"
            )
        return found

    def _canvas(self) -> tuple[Any, Any, Any]:
        """What to do with the picture, the editor, and how much is changed."""
        with gr.Accordion("From a picture", open=False, elem_id="canvas"):
            use = gr.Radio([NEW, REPAINT, CHANGE], value=NEW, label="Make", elem_id="use")
            editor = gr.ImageEditor(
                type="pil", image_mode="RGBA", format="png", canvas_size=(self.canvas, self.canvas),
                fixed_canvas=True, sources=["upload", "clipboard"], transforms=(), layers=False,
                brush=gr.Brush(default_size=max(24, self.canvas // 12)), label="Picture",
                elem_id="editor", buttons=["fullscreen"], height=self.canvas + 120,
            )  # fmt: skip
            strength = gr.Slider(
                0.05, 1, value=0.75, step=0.05, label="How much is changed", elem_id="strength"
            )
        return use, editor, strength

    def about(self) -> str:
        """The line under the title: device, precision, image size."""
        session = self.worker.session
        return (
            f"{session.device.type}, {str(session.dtype).removeprefix('torch.')}, images of "
            f"{self.side} x {self.side}"
        )

    def backends(self) -> str:
        """The backends that have run our ops so far."""
        names = {name for served in self.worker.served.values() for name in served}
        return f"backend {', '.join(sorted(names))}" if names else "no op of fastdiff"

    # What happens

    async def run(
        self, values: dict[str, Any], use: str, drawn: Any, past: list[dict[str, Any]]
    ) -> AsyncIterator[tuple[Any, ...]]:
        """The values of the outputs while an image is made.

        Raises:
            gr.Error: what the visitor set is wrong; the message says what to do.
        """
        start, skip = time.monotonic(), gr.skip()
        yield skip, "Waiting for a slot …", skip, skip, skip, skip
        try:
            images = pictured(self.facts, use, read_drawing(drawn, self.side))
            wanted = read_form(
                _numbers(values), self.facts, self.limits, served=self.name, **images
            )
            async for event in live(self.worker, wanted, self.limits):
                seconds = time.monotonic() - start
                if isinstance(event, Partial):
                    text = f"Preview {event.number + 1} of {wanted.partials}, {seconds:.1f} s"
                    yield to_pil(event.image), text, skip, skip, skip, skip
                    continue
                [job] = wanted.jobs
                steps, (_, height, width) = job.settings.total, event.result.image.shape
                text = (
                    f"{width} x {height}, {steps} steps in {seconds:.2f} s "
                    f"({steps / seconds:.1f} steps/s), {self.backends()}, seed {job.seed}"
                )
                recipe = {**event.result.recipe, "model": self.name}
                picture = self._saved(event.result.image, recipe)
                kept = {**values, "seed": str(job.seed)}
                entry = {"image": picture, "recipe": recipe, "text": text, "values": kept}
                past = [entry, *past][:HISTORY]
                pictures = [(each["image"], _caption(each["values"])) for each in past]
                yield picture, text, pictures, _as_text(recipe), past, 0
        except ApiError as error:
            yield skip, f"**Not made:** {error.message}", skip, skip, skip, skip
            raise gr.Error(error.message, title="Not made", print_exception=False) from None

    def _saved(self, image: Tensor, recipe: dict[str, Any]) -> str:
        """Write a PNG with its recipe where Gradio finds it; what it is given as pixels it saves
        without."""
        path = Path(self._folder.name) / f"{secrets.token_hex(16)}.png"
        to_pil(image).save(path, pnginfo=png_info(recipe, to_parameters(recipe)))
        return str(path)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the form with the types that requests have: browsers send 7.0 as 7.

    Raises:
        ApiError: the seed is no number.
    """
    found = dict(values)
    for name in ("guidance_scale", "strength"):
        if found.get(name) is not None:
            found[name] = float(found[name])
    if seed := (found.get("seed") or "").strip():
        if not seed.isdecimal():
            raise wrong(f"seed must be a whole number, or empty, got {seed!r:.40}", "seed")
        found["seed"] = int(seed)
    return found | {"seed": found["seed"] if seed else None}


def _caption(values: Mapping[str, Any]) -> str:
    return f"{values.get('prompt') or ''} · seed {values['seed']}".removeprefix(" · ")


def _as_text(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, indent=1, ensure_ascii=False)


def launch(page: Page, host: str, port: int, *, auth: list[tuple[str, str]], browser: bool) -> str:
    """Serve the page in threads of its own. Returns its URL.

    auth: names and passwords; empty: none is asked for.

    Raises:
        OSError: the port is in use.
    """
    _, url, _ = page.blocks.queue(max_size=page.limits.queue).launch(
        server_name=host,
        server_port=port,
        auth=auth or None,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=page.limits.upload_mib * MIB,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
    )
    return str(url)
