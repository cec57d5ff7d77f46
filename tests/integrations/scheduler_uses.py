"""Ways of using a diffusers scheduler: functions of a scheduler that return all visible results."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.peers import import_diffusers

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim-clip": ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.7}),
    "ddim-v-trailing": (
        "DDIMScheduler",
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
    ),
    "ddpm": ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 1.5}),
    "ddpm-large": ("DDPMScheduler", {"variance_type": "fixed_large", "steps_offset": 1}),
    "ddpm-learned": (
        "DDPMScheduler",
        {"variance_type": "learned_range", "prediction_type": "sample", "clip_sample": False},
    ),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "pndm-v": ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler-v-karras": (
        "EulerDiscreteScheduler",
        {"prediction_type": "v_prediction", "use_karras_sigmas": True},
    ),
    "euler-zero-snr": (
        "EulerDiscreteScheduler",
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "final_sigmas_type": "sigma_min",
        },
    ),
    "euler-x0-beta": (
        "EulerDiscreteScheduler",
        {"prediction_type": "sample", "use_beta_sigmas": True},
    ),
    "ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun-karras-clip": ("HeunDiscreteScheduler", {"use_karras_sigmas": True, "clip_sample": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lms-v-trailing": (
        "LMSDiscreteScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-v": ("KDPM2DiscreteScheduler", {"prediction_type": "v_prediction"}),
    "kdpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "singlestep": ("DPMSolverSinglestepScheduler", {}),
    "singlestep-3-heun": (
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min"},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-3-bh1-v": (
        "UniPCMultistepScheduler",
        {
            "solver_order": 3,
            "solver_type": "bh1",
            "prediction_type": "v_prediction",
            "final_sigmas_type": "sigma_min",
        },
    ),
    "unipc-3-x0": (
        "UniPCMultistepScheduler",
        {
            "solver_order": 3,
            "prediction_type": "sample",
            "disable_corrector": [0, 3],
            "timestep_spacing": "trailing",
        },
    ),
    "deis-1": ("DEISMultistepScheduler", {"solver_order": 1}),
    "ipndm": ("IPNDMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lcm-clip-v": ("LCMScheduler", {"clip_sample": True, "prediction_type": "v_prediction"}),
    "tcd": ("TCDScheduler", {}),
    "dpm-3": ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm-karras-v": (
        "DPMSolverMultistepScheduler",
        {
            "use_karras_sigmas": True,
            "prediction_type": "v_prediction",
            "final_sigmas_type": "sigma_min",
            "lower_order_final": False,
        },
    ),
    "dpm-sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True},
    ),
    "dpm-first-order": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 1, "use_lu_lambdas": True, "prediction_type": "sample"},
    ),
}
"""Each class that is served, and what its options change."""


@functools.cache
def made(case: str) -> Any:
    name, options = SCHEDULERS[case]
    betas = {} if name == "IPNDMScheduler" else BETAS  # it has a schedule of its own
    return getattr(import_diffusers(name), name)(**{**betas, **options})


def make(case: str) -> Any:
    """diffusers' own scheduler, as new (Heun's and Karras' take long to make)."""
    return copy.deepcopy(made(case))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 3, 5), generator=torch.Generator().manual_seed(seed))


def network(scheduler: Any, x: Tensor, t: Any) -> Tensor:
    """A function smooth in x and t, with twice the channels for a learned variance."""
    y = torch.tanh(0.7 * scheduler.scale_model_input(x, t) + float(t) / 1000)
    return torch.cat([y, y.flip(1)], dim=1) if learns(scheduler) else y


def learns(scheduler: Any) -> bool:
    return scheduler.config.get("variance_type") == "learned_range"


def begin(scheduler: Any, seed: int = 0, *shape: int) -> Tensor:
    return noise(seed, *shape) * scheduler.init_noise_sigma


Seen = list[Any]
Use = Callable[[Any], Seen]


def go(
    scheduler: Any, x: Tensor, timesteps: Any = None, seed: int = 3, **options: Any
) -> tuple[Tensor, Seen]:
    """A loop over timesteps: all that its steps return, and the state after them."""
    takes = inspect.signature(scheduler.step).parameters
    if "generator" in takes and "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(seed)
    seen: Seen = [x]
    for t in scheduler.timesteps if timesteps is None else timesteps:
        output = scheduler.step(network(scheduler, x, t), t, x, **options)
        x = output.prev_sample
        seen += [type(output).__name__, *output.to_tuple(), *state(scheduler)]
    return x, seen


def state(scheduler: Any) -> Seen:
    """All visible state of a scheduler."""
    names = (
        "num_inference_steps step_index begin_index order init_noise_sigma lower_order_nums "
        "counter custom_timesteps is_scale_input_called timesteps sigmas dt sample cur_sample "
        "model_outputs last_sample this_order timestep_list ets"
    )
    slope, dt = getattr(scheduler, "prev_derivative", None), getattr(scheduler, "dt", None)
    seen: Seen = [len(scheduler), slope if slope is None else slope * dt]  # what counts of it
    for name in names.split():
        value = getattr(scheduler, name, "absent")
        seen += [name, *(value if isinstance(value, list) else [value])]
    return seen


# --- the uses ---


def loop(s: Any) -> Seen:
    s.set_timesteps(5)
    return go(s, begin(s))[1]


def loop_of_tuples(s: Any) -> Seen:
    s.set_timesteps(4)
    x, seen, draw = begin(s), [], torch.Generator().manual_seed(1)
    more = {"generator": draw} if "generator" in inspect.signature(s.step).parameters else {}
    for t in s.timesteps:
        found = s.step(network(s, x, t), t, x, return_dict=False, **more)
        assert type(found) is tuple
        seen += found
        x = found[0]
    return seen


def keywords(s: Any) -> Seen:
    s.set_timesteps(num_inference_steps=3, device="cpu")
    x, t = begin(s), s.timesteps[0]
    torch.manual_seed(0)
    return [s.step(model_output=network(s, x, t), timestep=t, sample=x).prev_sample]


def many_steps(s: Any) -> Seen:
    """More than DPM-Solver++'s fifteen, which change its last step."""
    s.set_timesteps(17)
    return go(s, begin(s))[1]


def uneven_stride(s: Any) -> Seen:
    s.set_timesteps(7)
    return go(s, begin(s))[1]


def one_step(s: Any) -> Seen:
    s.set_timesteps(1)
    return go(s, begin(s))[1]


def as_many_steps_as_training(s: Any) -> Seen:
    s = s.from_config(s.config, num_train_timesteps=20, beta_start=0.02, beta_end=0.3)
    s.set_timesteps(20)
    return go(s, begin(s))[1]


def more_steps_than_training(s: Any) -> Seen:
    s = s.from_config(s.config, num_train_timesteps=10)
    s.set_timesteps(12)
    return go(s, begin(s))[1]


def image_to_image(s: Any) -> Seen:
    """Heun's timesteps occur twice: entered at the second, as its index_for_timestep says."""
    s.set_timesteps(10)
    timesteps = s.timesteps[5 * s.order :]
    x = s.add_noise(noise(1), noise(2), timesteps[:1].expand(2))
    return go(s, x, timesteps)[1]


def image_to_image_by_index(s: Any) -> Seen:
    s.set_timesteps(20)
    start = 14 * s.order
    timesteps = s.timesteps[start:]
    if hasattr(s, "set_begin_index"):
        s.set_begin_index(start)
    x = s.add_noise(noise(1), noise(2), timesteps[:1].expand(2))
    return go(s, x, timesteps)[1]


def inpainting(s: Any) -> Seen:
    """The known half is noised again after each step, at the scheduler's own place."""
    s.set_timesteps(6)
    if hasattr(s, "set_begin_index"):
        s.set_begin_index(0)
    x, mask, known = begin(s), noise(4) > 0, noise(1)
    seen: Seen = []
    for number, t in enumerate(s.timesteps):
        x, more = go(s, x, [t], seed=number)
        seen += more
        if number + 1 < len(s.timesteps):
            following = s.timesteps[number + 1].reshape(1).expand(2)
            x = torch.where(mask, x, s.add_noise(known, noise(number), following))
    return [*seen, x]


def custom_timesteps(s: Any) -> Seen:
    s.set_timesteps(timesteps=[999, 700, 400, 100])
    return go(s, begin(s))[1]


def custom_sigmas(s: Any) -> Seen:
    s.set_timesteps(sigmas=[14.0, 6.0, 2.0, 0.5, 0.0])
    return go(s, begin(s))[1]


def timesteps_put_in(s: Any) -> Seen:
    s.set_timesteps(10)
    s.timesteps = s.timesteps[::2].clone()
    return go(s, begin(s))[1]


def sigmas_put_in(s: Any) -> Seen:
    s.set_timesteps(5)
    if not hasattr(s, "sigmas"):
        return []
    first = go(s, begin(s), s.timesteps[:2])[1]
    s.sigmas *= 0.5  # in place
    return [*first, *go(s, begin(s), s.timesteps[2:4])[1]]


def gradients(s: Any) -> Seen:
    """As trainers of rewards do: through two steps, the second with a history."""
    s.set_timesteps(4)
    weight, x, draw = torch.tensor(0.8, requires_grad=True), begin(s), torch.Generator()
    x.requires_grad_()
    y: Tensor = x
    more = {"generator": draw} if "generator" in inspect.signature(s.step).parameters else {}
    for t in s.timesteps[: 2 * s.order]:
        y = s.step(weight * network(s, y, t), t, y, **more).prev_sample
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (weight, x))]


def gradient_of_the_last_step(s: Any) -> Seen:
    """Only the last output has a gradient."""
    s.set_timesteps(4)
    x, _ = go(s, begin(s), s.timesteps[: 2 * s.order])
    t = s.timesteps[2 * s.order]
    output = network(s, x, t).requires_grad_()
    torch.manual_seed(0)
    y = s.step(output, t, x).prev_sample
    return [y.detach(), *torch.autograd.grad(y.square().sum(), output)]


def gradient_ends(s: Any) -> Seen:
    """The first output has a gradient, the second step is without: the history has one."""
    s.set_timesteps(4)
    x, t = begin(s), s.timesteps[0]
    output = network(s, x, t).requires_grad_()
    torch.manual_seed(0)
    y = s.step(output, t, x).prev_sample.detach()
    z = s.step(network(s, y, s.timesteps[1]), s.timesteps[1], y).prev_sample
    seen: Seen = [y, z.detach(), z.requires_grad]
    return [*seen, *(torch.autograd.grad(z.sum(), output) if z.requires_grad else ())]


def twice(s: Any) -> Seen:
    s.set_timesteps(4)
    x, t = begin(s), s.timesteps[1]
    return [go(s, x, [t])[1] for _ in range(2)]


def two_loops(s: Any) -> Seen:
    s.set_timesteps(3)
    return [go(s, begin(s, seed), seed=seed)[1] for seed in (0, 1)]


def tiles(s: Any) -> Seen:
    """Parts of one image in turn, at each timestep."""
    s.set_timesteps(4)
    parts, seen = [begin(s, 0), begin(s, 1)], []
    for t in s.timesteps[:2]:
        for number, part in enumerate(parts):
            parts[number], more = go(s, part, [t], seed=number)
            seen += more
    return seen


def backwards(s: Any) -> Seen:
    s.set_timesteps(6)
    return go(s, noise(0), s.timesteps.flip(0))[1]


def out_of_order(s: Any) -> Seen:
    s.set_timesteps(6)
    return go(s, noise(0), s.timesteps[torch.tensor([3, 1, 1, 5, 0])])[1]


def started_again(s: Any) -> Seen:
    s.set_timesteps(6)
    first = go(s, begin(s), s.timesteps[:3])[1]
    s.set_timesteps(4)
    return [*first, *go(s, begin(s))[1]]


def after_the_end(s: Any) -> Seen:
    s.set_timesteps(6)
    x, seen = go(s, begin(s))
    return [*seen, *go(s, x, [s.timesteps[-1]])[1]]


def without_set_timesteps(s: Any) -> Seen:
    timesteps = s.timesteps
    return go(s, begin(s), timesteps[:3] if timesteps is not None else [999])[1]


def fork(s: Any, copied: Callable[[Any], Any]) -> Seen:
    """A copy in the middle of a run, and both go on in turn."""
    s.set_timesteps(6)
    x, seen = go(s, begin(s), s.timesteps[:3])
    other, y = copied(s), x + 1
    for number, t in enumerate(s.timesteps[3:6]):
        x, first = go(s, x, [t], seed=number)
        y, second = go(other, y, [t], seed=number)
        seen += [*first, *second]
    return seen


def deep_fork(s: Any) -> Seen:
    return fork(s, copy.deepcopy)


def shallow_fork(s: Any) -> Seen:
    return fork(s, copy.copy)


def pickled_fork(s: Any) -> Seen:
    return fork(s, lambda s: pickle.loads(pickle.dumps(s)))  # noqa: S301


def from_config(s: Any) -> Seen:
    other = type(s).from_config(s.config)
    other.set_timesteps(4)
    return [dict(other.config), *go(other, begin(other))[1]]


def from_config_of_another_kind(s: Any) -> Seen:
    """The class of the scheduler with an option that no row covers."""
    other = type(s).from_config(s.config, thresholding=True, solver_order=3, clip_sample=True)
    other.set_timesteps(5)
    return go(other, begin(other))[1]


def config_changed(s: Any) -> Seen:
    s.set_timesteps(4)
    x, seen = go(s, begin(s), s.timesteps[:2])
    s.register_to_config(prediction_type="v_prediction")
    return [*seen, *go(s, x, s.timesteps[2:])[1]]


def history_changed(s: Any) -> Seen:
    """A callback that writes into what the scheduler remembers."""
    s.set_timesteps(5)
    x, seen = go(s, begin(s), s.timesteps[:2])
    for name in ("model_outputs", "ets", "derivatives"):
        for tensor in getattr(s, name, []):
            if tensor is not None:
                tensor.mul_(0.5)
    return [*seen, *go(s, x, s.timesteps[2:4])[1]]


def history_kept(s: Any) -> Seen:
    """A callback that collects what the scheduler remembers: nothing of it changes later."""
    s.set_timesteps(6)
    x, kept = begin(s), []
    for t in s.timesteps:
        x, _ = go(s, x, [t])
        for name in ("model_outputs", "ets", "derivatives", "prev_derivative", "sample"):
            value = getattr(s, name, None)
            kept += value if isinstance(value, list) else [value]
    return kept


def written_in_place(s: Any) -> Seen:
    """A callback that changes the sample between two steps in place."""
    s.set_timesteps(5)
    x, seen = begin(s), []
    for number, t in enumerate(s.timesteps):
        x, more = go(s, x, [t], seed=number)
        seen += [part.clone() if isinstance(part, Tensor) else part for part in more]
        x += 0.1
    return seen


def half_precision(s: Any) -> Seen:
    s.set_timesteps(3)
    x, t = begin(s).half(), s.timesteps[0]
    torch.manual_seed(0)
    return [s.step(network(s, x, t).half(), t, x).prev_sample.dtype]


def mixed_precision(s: Any) -> Seen:
    """Latents in fp32, a network in bf16."""
    s.set_timesteps(3)
    x, t = begin(s), s.timesteps[0]
    torch.manual_seed(0)
    output = s.step(network(s, x, t).bfloat16(), t, x)
    return [part.dtype for part in output.to_tuple()]


def double_precision(s: Any) -> Seen:
    s.set_timesteps(5)
    x = begin(s).double()
    return go(s, x)[1]


def shapes(s: Any) -> Seen:
    seen: Seen = []
    for shape in ((2, 4), (2, 4, 6), (1, 4, 2, 3, 2), (0, 4, 2, 2)):
        s.set_timesteps(3)
        seen += go(s, begin(s, 0, *shape))[1]
    return seen


def a_vector(s: Any) -> Seen:
    s.set_timesteps(3)
    return go(s, begin(s, 0, 6))[1]


def channels_last(s: Any) -> Seen:
    s.set_timesteps(4)
    return go(s, begin(s).contiguous(memory_format=torch.channels_last))[1]


def not_contiguous(s: Any) -> Seen:
    s.set_timesteps(4)
    return go(s, begin(s).transpose(2, 3))[1]


def expanded(s: Any) -> Seen:
    s.set_timesteps(4)
    return go(s, begin(s, 0, 1, 4, 3, 5).expand(2, 4, 3, 5))[1]


def broadcast(s: Any) -> Seen:
    """An output for one image, samples for two."""
    s.set_timesteps(3)
    x, t = begin(s), s.timesteps[0]
    torch.manual_seed(0)
    return list(s.step(network(s, x[:1], t), t, x).to_tuple())


def batch_shrinks(s: Any) -> Seen:
    s.set_timesteps(5)
    x, seen = go(s, begin(s), s.timesteps[:2])
    return [*seen, *go(s, x[:1], s.timesteps[2:4])[1]]


def inference_mode(s: Any) -> Seen:
    s.set_timesteps(5)
    with torch.inference_mode():
        x, seen = go(s, begin(s), s.timesteps[:3])
    return [*seen, *go(s, x.clone(), s.timesteps[3:])[1]]


def timesteps_of_other_types(s: Any) -> Seen:
    seen: Seen = []
    for to in (int, float, lambda t: t.reshape(1), lambda t: t.float(), lambda t: t.clone()):
        s.set_timesteps(4)
        seen.append(outcome(functools.partial(step_at, given=to(s.timesteps[0])), s))
    return seen


def timesteps_that_are_not_its_own(s: Any) -> Seen:
    seen: Seen = []
    for t in (513, 513.5, 1000, -1):
        s.set_timesteps(4)
        seen.append(outcome(functools.partial(step_at, given=t), s))
    return seen


def step_at(s: Any, given: Any) -> Seen:
    """One step from noise, at a timestep of any kind."""
    x = begin(s)
    torch.manual_seed(0)
    return list(s.step(network(s, x, s.timesteps[0]), given, x).to_tuple())


def options_of_step(s: Any) -> Seen:
    takes, seen = inspect.signature(s.step).parameters, []
    given: list[dict[str, Any]] = [
        {"eta": 0.7},
        {"eta": 1.3},
        {"eta": 1.0, "variance_noise": noise(9)},
        {"variance_noise": noise(9)},
        {"use_clipped_model_output": True},
        {"s_churn": 0.3, "s_noise": 1.1},
        {"s_tmin": 2.0, "s_noise": 1.1},
        {"generator": [torch.Generator().manual_seed(seed) for seed in (4, 5)]},
        {"generator": [torch.Generator().manual_seed(4)]},
        {"generator": [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]},
        {"no_such_option": 1},
    ]
    for more in given:
        if set(more) <= {*takes, "no_such_option"}:
            options = {"generator": torch.Generator().manual_seed(2), **more}
            options = {k: v for k, v in options.items() if k in takes or k in more}
            s.set_timesteps(4)
            seen.append(outcome(functools.partial(one_loop, options), s))
    return seen


def one_loop(options: dict[str, Any], s: Any) -> Seen:
    return go(s, begin(s), **options)[1]


def generators_move_on(s: Any) -> Seen:
    """Two images of one generator, and where it is then."""
    draw, seen = torch.Generator().manual_seed(8), []
    takes = "generator" in inspect.signature(s.step).parameters
    for _ in range(2):
        s.set_timesteps(3)
        seen += go(s, begin(s), **({"generator": draw} if takes else {}))[1]
    return [*seen, draw.get_state()]


def vmapped(s: Any) -> Seen:
    s.set_timesteps(4)
    xs, t = torch.stack([begin(s, 0), begin(s, 1)]), s.timesteps[0]
    output = network(s, xs[0], t)
    torch.manual_seed(0)

    def step(x: Tensor) -> Tensor:
        return s.step(output, t, x, return_dict=False)[0]

    return [torch.vmap(step, randomness="same")(xs)]


def forward_mode(s: Any) -> Seen:
    s.set_timesteps(4)
    x, t = begin(s), s.timesteps[0]
    output = network(s, x, t)
    torch.manual_seed(0)

    def step(x: Tensor) -> Tensor:
        return s.step(output, t, x, return_dict=False)[0]

    return list(torch.func.jvp(step, (x,), (noise(5),)))


def threads(s: Any) -> Seen:
    """A scheduler without state serves two loops at once."""
    if s.order != 1 or any(hasattr(s, name) for name in ("sigmas", "ets", "_step_index")):
        return []
    s.set_timesteps(10)
    found: dict[int, Seen] = {}

    def run(seed: int) -> None:
        found[seed] = go(s, begin(s, seed), seed=seed)[1]

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [found[0], found[1]]


def noise_and_velocity(s: Any) -> Seen:
    """What a trainer calls."""
    s.set_timesteps(10)
    t = s.timesteps[[3, 5]]
    seen: Seen = [s.add_noise(noise(0), noise(1), t)]
    return [*seen, s.get_velocity(noise(0), noise(1), t)] if hasattr(s, "get_velocity") else seen


def seen_from_outside(s: Any) -> Seen:
    """What pipelines query before they use a scheduler."""
    methods = ("step", "set_timesteps", "scale_model_input", "add_noise", "set_begin_index")
    seen: Seen = [str(inspect.signature(getattr(s, m))) for m in methods if hasattr(s, m)]
    return [
        *seen,
        type(s).__name__,
        type(s).__module__,
        dict(s.config),
        [kind.__name__ for kind in s.compatibles],
        sorted(name for name in vars(s) if name != "_fused"),
        str(s),
    ]


USES: list[Use] = [
    loop, loop_of_tuples, keywords, many_steps, uneven_stride, one_step, as_many_steps_as_training,
    more_steps_than_training, image_to_image, image_to_image_by_index, inpainting,
    custom_timesteps, custom_sigmas, timesteps_put_in, sigmas_put_in, gradients,
    gradient_of_the_last_step, gradient_ends, twice, two_loops, tiles, backwards, out_of_order,
    started_again, after_the_end, without_set_timesteps, deep_fork, shallow_fork, pickled_fork,
    from_config, from_config_of_another_kind, config_changed, history_changed, history_kept,
    written_in_place, half_precision, mixed_precision, double_precision, shapes, a_vector,
    channels_last, not_contiguous, expanded, broadcast, batch_shrinks, inference_mode,
    timesteps_of_other_types, timesteps_that_are_not_its_own, options_of_step, generators_move_on,
    vmapped, forward_mode, threads, noise_and_velocity, seen_from_outside,
]  # fmt: skip


def outcome(use: Use, scheduler: Any) -> Seen:
    """The results of a use, or the error that ends it."""
    try:
        return use(scheduler)
    except Exception as error:  # noqa: BLE001 - the same error is wanted, whatever it is
        return [type(error).__name__, str(error)]
