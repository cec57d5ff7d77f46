"""``fastdiff samplers``: list the samplers, and show what they do in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import tyro

from fastdiff.cli.console import print_numbers, print_pairs
from fastdiff.cli.parsing import (
    OptionalFloat,
    OptionalInt,
    OptionalName,
    OptionalPath,
    one_of,
    parse,
)
from fastdiff.diffusion.respacing import check_spacing, respacing_steps
from fastdiff.names import Prediction, ScheduleKind

if TYPE_CHECKING:
    from fastdiff.diffusion.samplers import SamplerTable

DEFAULT_STEPS = 10
COLUMNS_LEGEND = """\
x0 = u x + v F, where F is the network's output; then x <- a x + b x0 + c1 h1 + c2 h2 + c3 h3 +
s noise, and unless slot is -1, h[slot] <- p x + q x0. sigma is noise / signal, w the guidance."""


@dataclass(frozen=True, kw_only=True)
class Samplers:
    """List the samplers, or print or plot their tables.

    A sampler is a table with one row per network evaluation; every row is a linear update. Without
    names, all samplers are listed; with names, their tables are printed, or plotted with --plot.

    Examples:
      fastdiff samplers
      fastdiff samplers dpmpp-2m --steps 20 --spacing karras
      fastdiff samplers ddim heun fastdpm --steps 20 --plot out/samplers.png
    """

    names: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint=""),
    ] = ()
    """Samplers to show."""
    steps: OptionalInt = None
    """Steps from noise to image; by default 10, or the number in a spacing such as 10,15,20."""
    spacing: OptionalName = None
    """How the steps are spaced: trailing, leading, linspace, simple, karras, exponential; FastDPM's
    var-linear, var-quadratic, step-linear, step-quadratic; or IDDPM's strings such as 10,15,20 and
    ddim50. By default the sampler's own."""
    schedule: ScheduleKind = "scaled_linear"
    """Noise schedule that the model was trained with; "scaled_linear" is Stable Diffusion's, "flow"
    that of flow matching (with --prediction flow)."""
    shift: float = 1.0
    """Shift of the noise levels with schedule "flow"; Stable Diffusion 3 uses 3."""
    prediction: Prediction = "eps"
    """What the network returns: the noise, the velocity, the clean image, or noise minus image."""
    eta: OptionalFloat = None
    """Amount of fresh noise, 0 to 1, for samplers with this option."""
    guidance_scale: float = 1.0
    """Weight of classifier-free guidance; 1: no guidance."""
    plot: OptionalPath = None
    """Plot the tables to this PNG, SVG or PDF file instead of printing them."""

    def __post_init__(self) -> None:
        if self.spacing is not None:
            check_spacing(self.spacing)

    @property
    def total(self) -> int:
        """The number of steps."""
        if self.steps is not None:
            return self.steps
        return (self.spacing and respacing_steps(self.spacing)) or DEFAULT_STEPS


def main(words: Sequence[str]) -> int:
    options = parse(Samplers, words, prog="fastdiff samplers")
    return 0 if options is None else run(options)


def run(options: Samplers) -> int:
    from fastdiff.diffusion.samplers import SAMPLERS

    for name in options.names:
        one_of(name, SAMPLERS, "sampler")
    if options.plot is not None:
        from fastdiff.diffusion.plots import plot_tables

        names = options.names or tuple(SAMPLERS)
        plot_tables([_table(name, options) for name in names], options.plot)
        print(options.plot)
    elif options.names:
        for number, name in enumerate(options.names):
            if number:
                print()
            _print_table(_table(name, options), options.total)
    else:
        print_pairs(
            [(name, f"{sampler.headline} [{sampler.cost}]") for name, sampler in SAMPLERS.items()]
        )
    return 0


def _table(name: str, options: Samplers) -> SamplerTable:
    from fastdiff.diffusion.samplers import SAMPLERS, build_table
    from fastdiff.diffusion.schedules import ScheduleConfig, noise_schedule

    config = ScheduleConfig(kind=options.schedule, shift=options.shift)
    if options.schedule == "scaled_linear":  # use Stable Diffusion's ends; the default is DDPM's
        config = replace(config, beta_start=0.00085, beta_end=0.012)
    # With several names, --eta applies to the samplers that have it.
    takes_eta = "eta" in SAMPLERS[name].options or len(options.names) == 1
    return build_table(
        name,
        noise_schedule(config),
        options.total,
        prediction=options.prediction,
        spacing=options.spacing,
        guidance_scale=options.guidance_scale,
        eta=options.eta if takes_eta else None,
    )


def _print_table(table: SamplerTable, steps: int) -> None:
    from fastdiff.diffusion.samplers import SAMPLERS

    sampler = SAMPLERS[table.name]
    heading, *rows = [["0" if cell == "-0" else cell for cell in row] for row in table.describe()]
    if all(row[0] == row[1] for row in rows):  # one evaluation per step: drop a column
        heading, rows = [heading[0], *heading[2:]], [[row[0], *row[2:]] for row in rows]
    constant = [
        index
        for index in range(1, len(heading))
        if len({row[index] for row in rows}) == 1 < len(rows)
    ]
    kept = [index for index in range(len(heading)) if index not in constant]
    print(f"{table.name}: {sampler.headline}")
    print(f"{sampler.cost}; {len(table)} rows for {steps} steps.")
    if sampler.options:
        print(f"Options in Python: {', '.join(sampler.options)}.")
    print(COLUMNS_LEGEND)
    if constant:
        print("In every row:", ", ".join(f"{heading[i]} = {rows[0][i]}" for i in constant))
    print()
    print_numbers([[line[index] for index in kept] for line in [heading, *rows]])
