"""What callers do with a scheduler besides running a loop: configure it, save it, add noise, read
and set its attributes, call its other methods. Same form as `scheduler_uses`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.integrations.scheduler_uses import Seen, Use, begin, go, network, noise, outcome, state

# --- configuration ---


def reconfigured(s: Any, **options: Any) -> Any:
    """A scheduler of the same class with other options, as far as it accepts them."""
    known = inspect.signature(type(s).__init__).parameters
    return type(s).from_config(s.config, **{k: v for k, v in options.items() if k in known})


def each(s: Any, *settings: dict[str, Any], steps: int = 4) -> Seen:
    """A loop under each setting that the class has an option for, or the error it ends in."""
    known = inspect.signature(type(s).__init__).parameters

    def use(s: Any, options: dict[str, Any]) -> Seen:
        other = reconfigured(s, **options)
        other.set_timesteps(steps)
        return go(other, begin(other))[1]

    return [
        outcome(functools.partial(use, options=options), s)
        for options in settings
        if set(options) <= set(known)
    ]


def beta_schedules(s: Any) -> Seen:
    names = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp", "none")
    return each(s, *({"beta_schedule": name, "timestep_spacing": "leading"} for name in names))


def ranges_of_beta(s: Any) -> Seen:
    ends = ((1e-5, 2e-4), (1e-4, 0.002), (0.001, 0.02), (0.01, 0.2), (0.1, 2.0))
    return each(s, *({"beta_start": low, "beta_end": high} for low, high in ends))


def betas_of_a_training(s: Any) -> Seen:
    given = np.linspace(0.001, 0.3, 12)
    betas = ({"trained_betas": given}, {"trained_betas": given.tolist(), "num_train_timesteps": 12})
    return each(s, *betas)


def lengths_of_training(s: Any) -> Seen:
    return each(s, *({"num_train_timesteps": count} for count in (1, 25, 100, 999, 1100)))


def spacings(s: Any) -> Seen:
    names = ("linspace", "leading", "trailing", "none")
    both = itertools.product(names, (0, 1))
    return each(s, *({"timestep_spacing": name, "steps_offset": k} for name, k in both))


def zero_terminal_snr(s: Any) -> Seen:
    """The first timestep is pure noise; only v- and x0-prediction can start there."""
    kinds = ("epsilon", "v_prediction", "sample")
    ends = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return each(s, *({**ends, "prediction_type": kind} for kind in kinds))


def prediction_types(s: Any) -> Seen:
    kinds = ("epsilon", "v_prediction", "sample", "original_sample", "flow_prediction", "none")
    return each(s, *({"prediction_type": kind} for kind in kinds))


def variance_types(s: Any) -> Seen:
    kinds = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned")
    return each(s, *({"variance_type": kind} for kind in (*kinds, "learned_range", "none")))


def clamps(s: Any) -> Seen:
    kinds = ("epsilon", "v_prediction", "sample")
    ranges = itertools.product(kinds, (0.3, 1.0, 2.0))
    return each(
        s,
        {"clip_sample": True},
        {"clip_sample": False},
        *(
            {"clip_sample": True, "clip_sample_range": bound, "prediction_type": kind}
            for kind, bound in ranges
        ),
    )


def thresholds(s: Any) -> Seen:
    bounds = itertools.product(("epsilon", "v_prediction", "sample"), (0.5, 1.0, 2.0))
    return each(
        s,
        *(
            {"thresholding": True, "sample_max_value": bound, "prediction_type": kind}
            for kind, bound in bounds
        ),
        {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5},
    )


def spacings_of_sigmas(s: Any) -> Seen:
    return each(
        s,
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_lu_lambdas": True},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous", "use_karras_sigmas": True},
        {"sigma_min": 0.1, "sigma_max": 20.0, "use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "zero"},
        {"lambda_min_clipped": -5.1},
        {"use_karras_sigmas": True, "use_beta_sigmas": True},  # refused
    )


def solvers(s: Any) -> Seen:
    """Orders, types and endings of DPM-Solver, in a short and a long loop."""
    seen: Seen = []
    algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
    for algorithm, kind, order in itertools.product(algorithms, ("midpoint", "heun"), (1, 2, 3)):
        more = {"algorithm_type": algorithm, "solver_type": kind, "solver_order": order}
        seen += each(s, {**more, "final_sigmas_type": "sigma_min"})
    for low, euler, steps in itertools.product((False, True), (False, True), (3, 16)):
        seen += each(s, {"lower_order_final": low, "euler_at_final": euler}, steps=steps)
    return seen


def runge_kutta_start(s: Any) -> Seen:
    """PNDM's default: three timesteps of four evaluations each before the multistep part."""
    return each(s, {"skip_prk_steps": False}, {"skip_prk_steps": False, "set_alpha_to_one": True})


def counts_of_steps(s: Any) -> Seen:
    """Timesteps only, errors included."""

    def use(s: Any, given: Any) -> Seen:
        s.set_timesteps(**given)
        return [s.timesteps, s.num_inference_steps, len(s), *state(s)]

    calls: list[dict[str, Any]] = [
        *({"num_inference_steps": n} for n in (0, -1, 2.5, 27, 999, 1000, 1001, None, "7")),
        {"num_inference_steps": 4, "device": torch.device("cpu")},
        {"timesteps": [100, 87, 50, 1, 0]},
        {"timesteps": [100, 87, 50, 51, 0]},
        {"timesteps": [1000]},
        {"timesteps": torch.tensor([901, 500, 20])},
        {"timesteps": np.array([901, 500, 20])},
        {"num_inference_steps": 5, "timesteps": [100, 87, 50, 1, 0]},
        {"sigmas": torch.tensor([14.0, 3.0, 1.0, 0.0])},
        {"num_inference_steps": 5, "sigmas": [14.0, 3.0, 1.0, 0.0]},
    ]
    return [outcome(functools.partial(use, given=given), s) for given in calls]


def timesteps_handed_to_another(s: Any) -> Seen:
    """One scheduler's, passed to a fresh scheduler, which has to produce the same sample."""
    s.set_timesteps(6)
    given = s.timesteps
    if s.order == 2:
        given = torch.cat([given[:1], given[1::2]])
    other = type(s).from_config(s.config)
    other.set_timesteps(timesteps=given)
    return [*go(s, begin(s))[1], *go(other, begin(other))[1]]


# --- files and classes ---


def saved_and_loaded(s: Any) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        s.save_pretrained(folder)
        text = Path(folder, "scheduler_config.json").read_text()
        other = type(s).from_pretrained(folder)
    other.set_timesteps(4)
    return [text, dict(other.config), s.to_json_string(), *go(other, begin(other))[1]]


def config_saved_alone(s: Any) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        s.save_config(folder)
        config = type(s).load_config(folder)
        other, unused = type(s).from_pretrained(folder, return_unused_kwargs=True, no_such_option=1)
    return [config, unused, dict(other.config), type(other).__name__]


def saved_by_torch(s: Any) -> Seen:
    """In the middle of a run."""
    s.set_timesteps(5)
    x, seen = go(s, begin(s), s.timesteps[:3])
    file = io.BytesIO()
    torch.save({"scheduler": s}, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)["scheduler"]
    return [*seen, *state(other), *go(other, x, s.timesteps[3:])[1]]


def compatible_classes(s: Any) -> Seen:
    """Each class that a pipeline may switch to, and back."""

    def use(s: Any, kind: Any) -> Seen:
        other = kind.from_config(s.config)
        back = type(s).from_config(other.config)
        back.set_timesteps(4)
        own = {k: v for k, v in back.config.items() if k in s.config}
        return [type(other).__name__, dict(other.config), own, *go(back, begin(back))[1]]

    kinds = {kind.__name__: kind for kind in s.compatibles if kind.__name__ not in SLOW}
    return [
        sorted(kinds),
        *(outcome(functools.partial(use, kind=kind), s) for _, kind in sorted(kinds.items())),
    ]


SLOW = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")


def class_checks(s: Any) -> Seen:
    """What pipelines ask for by class."""
    import diffusers

    names = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
    kinds = [*(getattr(diffusers, name) for name in names), diffusers.SchedulerMixin]
    return [
        *(isinstance(s, kind) for kind in kinds),
        *(issubclass(type(s), kind) for kind in kinds),
        s.__class__.__name__,
        s.__class__.__qualname__,
        s.config_name,
        sorted(s._compatibles),
        s.has_compatibles,
        s.step.__name__,
        s.step.__doc__,
        inspect.getfullargspec(s.step),
    ]


# --- attributes ---


def attributes_of_the_config(s: Any) -> Seen:
    """Read off the object, which diffusers warns about; names that do not exist."""
    seen: Seen = []
    s.own_attribute = 5
    s.register_to_config(own_option=6)
    for name in ("own_attribute", "own_option", "num_train_timesteps", "does_not_exist"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen.append(outcome(lambda s, name=name: [getattr(s, name)], s))
        seen.append([w.category.__name__ for w in caught])
    s.set_timesteps(3)
    return [*seen, *go(s, begin(s))[1]]


def history_put_in(s: Any) -> Seen:
    """Outputs of steps that never happened, as diffusers' own tests put in."""
    s.set_timesteps(10)
    x = noise(0)
    past = [0.1 * x + shift for shift in (0.2, 0.15, 0.1, 0.05)]
    if hasattr(s, "model_outputs"):
        s.model_outputs = past[: s.config.solver_order]
        s.lower_order_nums = 1
    if hasattr(s, "ets"):
        s.ets, s.counter = past[:], 5
    seen = go(s, x, s.timesteps[2:6])[1]
    return [*seen, *past]


def place_set_back(s: Any) -> Seen:
    """A step is repeated after its index was set back, as loops with time travel do."""
    s.set_timesteps(8)
    x, seen = go(s, begin(s), s.timesteps[: 2 * s.order])
    if hasattr(s, "_step_index"):
        s._step_index -= s.order
    y, more = go(s, x + 0.1, s.timesteps[s.order : 3 * s.order], seed=5)
    if hasattr(s, "_step_index"):
        s._step_index = None
    return [*seen, *more, *go(s, y, s.timesteps[3 * s.order : 4 * s.order], seed=6)[1]]


def begin_index_set(s: Any) -> Seen:
    """It decides, whatever the timestep; also once the run has begun, where it does nothing."""
    s.set_timesteps(8)
    if not hasattr(s, "set_begin_index"):
        return []
    s.set_begin_index(2)
    x, seen = go(s, noise(0), s.timesteps[:2])
    s.set_begin_index(5)
    seen += go(s, x, s.timesteps[2:4])[1]
    s.set_timesteps(8)
    return [*seen, *state(s)]


def numbers_replaced(s: Any) -> Seen:
    """Other noise levels put in between steps, of another dtype where it has them."""
    s.set_timesteps(6)
    x, seen = go(s, begin(s), s.timesteps[: 2 * s.order])
    if hasattr(s, "sigmas"):
        s.sigmas = s.sigmas.double() * 0.9
    s.alphas_cumprod = s.alphas_cumprod * 0.95
    if hasattr(s, "final_alpha_cumprod"):
        s.final_alpha_cumprod = torch.tensor(0.97)
    return [*seen, *go(s, x, s.timesteps[2 * s.order :])[1]]


def method_replaced(s: Any) -> Seen:
    """On the object, after the run has begun: what `step` calls, and `step` itself."""
    s.set_timesteps(6)
    x, seen = go(s, begin(s), s.timesteps[: 2 * s.order])
    for name in ("_get_variance", "convert_model_output", "_get_prev_sample", "previous_timestep"):
        if hasattr(s, name):
            before = getattr(s, name)
            setattr(s, name, lambda *a, before=before, **k: 0.5 * before(*a, **k))
            x, more = outcome_of(s, x, s.timesteps[2 * s.order : 3 * s.order])
            seen += more
            delattr(s, name)
    step = s.step
    s.step = functools.partial(step)
    more = {"generator": torch.Generator()} if takes_generator(step) else {}
    t = s.timesteps[3 * s.order]
    return [*seen, *s.step(network(s, x, t), t, x, **more).to_tuple()]


def outcome_of(s: Any, x: Tensor, timesteps: Any) -> tuple[Tensor, Seen]:
    """A loop, or the error that it ends in, from which x comes back as it was."""
    try:
        return go(s, x, timesteps)
    except Exception as error:  # noqa: BLE001 - the same error is wanted, whatever it is
        return x, [type(error).__name__, str(error)]


def takes_generator(step: Any) -> bool:
    return "generator" in inspect.signature(step).parameters


# --- methods other than step ---


def noise_before_and_in_a_run(s: Any) -> Seen:
    """Before `set_timesteps`, at a place that was set, after a step; dtypes, shapes, errors."""
    seen: Seen = []

    def add(*shape: int, t: Any, dtype: Any = torch.float32) -> None:
        x, more = noise(0, *shape).to(dtype), noise(1, *shape).to(dtype)
        for name in ("add_noise", "get_velocity"):
            if hasattr(s, name):
                found = outcome(lambda s, name=name: [getattr(s, name)(x, more, t)], s)
                seen.extend([*found, getattr(found[0], "dtype", None)])

    for t in (torch.tensor([10, 500]), torch.tensor([3]), torch.tensor([10.5, 2.0]), 7, 2000):
        add(2, 4, 3, 5, t=t)
    s.set_timesteps(8)
    t = s.timesteps[[1, 6]]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        add(2, 4, 3, 5, t=t, dtype=dtype)
    for shape in ((2, 4), (2, 4, 6), (2, 4, 2, 3, 2), (0, 4, 2, 2)):
        add(*shape, t=t[: shape[0]])
    add(2, 4, 3, 5, t=t.int())
    add(2, 4, 3, 5, t=t[:1].expand(2))
    if hasattr(s, "set_begin_index"):
        s.set_begin_index(3)
        add(2, 4, 3, 5, t=t)
    go(s, begin(s), s.timesteps[: 2 * s.order])
    add(2, 4, 3, 5, t=t)
    return seen


def scaled_inputs(s: Any) -> Seen:
    seen: Seen = [outcome(lambda s: [s.init_noise_sigma], s)]
    for t in (0, 0.0, 999.0, torch.tensor(999)):
        seen.append(outcome(lambda s, t=t: [s.scale_model_input(noise(0), t)], s))
    s.set_timesteps(5)
    x, t = noise(0), s.timesteps[2]
    scaled = s.scale_model_input(x, t)
    twice = s.scale_model_input(sample=scaled, timestep=t)
    return [*seen, scaled, twice, s.init_noise_sigma, *state(s)]


def inner_methods(s: Any) -> Seen:
    """Called from outside by pipelines that edit and invert images, and by diffusers' tests."""
    s.set_timesteps(10)
    x, t = noise(0), s.timesteps[3]
    calls: dict[str, list[tuple[Any, ...]]] = {
        "_get_variance": [(487, 486), (0, 0), (999, 998), (487,)],
        "previous_timestep": [(t,), (s.timesteps[-1],), (7,)],
        "index_for_timestep": [(t,), (t, s.timesteps), (5.5,)],
        "_threshold_sample": [(3 * x,)],
        "_sigma_to_t": [(np.array(1.5), np.log(np.linspace(0.1, 10, 20)))],
        "step_plms": [(0.1 * x, t, x)],
        "step_prk": [(0.1 * x, t, x)],
    }
    seen: Seen = []
    for name, several in calls.items():
        for given in several if hasattr(s, name) else ():
            found = outcome(lambda s, name=name, given=given: [getattr(s, name)(*given)], s)
            seen += [name, *(f.to_tuple() if hasattr(f, "to_tuple") else f for f in found)]
    if hasattr(s, "convert_model_output"):
        s._step_index = 3
        seen.append(s.convert_model_output(0.1 * x, sample=x))
        seen.append(s.dpm_solver_first_order_update(0.1 * x, sample=x, noise=noise(2)))
    return [*seen, *state(s)]


# --- other forms of a call ---


def positional(s: Any) -> Seen:
    """Every argument by place."""
    s.set_timesteps(4)
    x, draw = begin(s), torch.Generator().manual_seed(3)
    defaults = {
        name: p.default
        for name, p in inspect.signature(s.step).parameters.items()
        if name not in ("model_output", "timestep", "sample")
    }
    known = {"generator": draw, "return_dict": False, "eta": 0.6}
    more = [known.get(name, default) for name, default in defaults.items()]
    seen: Seen = []
    for t in s.timesteps:
        found = s.step(network(s, x, t), t, x, *more)
        seen += [type(found).__name__, *found]
        x = found[0]
    return seen


def dtypes(s: Any) -> Seen:
    """The result for each pair of inputs."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
    seen: Seen = []

    def use(s: Any, of_output: torch.dtype, of_sample: torch.dtype) -> Seen:
        s.set_timesteps(3)
        x, t = begin(s), s.timesteps[0]
        torch.manual_seed(0)
        found = s.step(network(s, x, t).to(of_output), t, x.to(of_sample))
        return [part.dtype for part in found.to_tuple()]

    for pair in itertools.product(kinds, kinds):
        found = outcome(functools.partial(use, of_output=pair[0], of_sample=pair[1]), s)
        seen += [pair, *found]
    return seen


def parameters_and_subclasses(s: Any) -> Seen:
    class Marked(Tensor):
        pass

    kinds: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: nn.Parameter(x, requires_grad=False),
        lambda x: x.as_subclass(Marked),
    )
    seen: Seen = []
    for wrap in kinds:
        s.set_timesteps(3)
        x, t = begin(s), s.timesteps[0]
        torch.manual_seed(0)
        y = s.step(network(s, x, t), t, wrap(x)).prev_sample
        seen += [type(y).__name__, y.as_subclass(Tensor), y.requires_grad]
    return seen


def inputs_stay(s: Any) -> Seen:
    """Arguments are not modified, and the returned sample is a new tensor."""
    s.set_timesteps(4)
    seen: Seen = []
    x = begin(s)
    for t in s.timesteps[: 2 * s.order]:
        output = network(s, x, t)
        before = x.clone(), output.clone()
        torch.manual_seed(0)
        y = s.step(output, t, x).prev_sample
        shared = [y.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() for z in before]
        seen += [torch.equal(x, before[0]), torch.equal(output, before[1]), *shared]
        x = y
    return seen


def not_finite(s: Any) -> Seen:
    """A network that overflowed: finite values stay as they are, and others stay non-finite."""
    s.set_timesteps(5)
    x = begin(s)
    seen: Seen = []
    for number, t in enumerate(s.timesteps[: 2 * s.order]):
        output = network(s, x, t)
        if number == 0:
            output[0, 0, 0, :2] = torch.tensor([float("inf"), float("nan")])
        torch.manual_seed(number)
        x = s.step(output, t, x).prev_sample
        seen += [x.isfinite(), x.nan_to_num(0, 0, 0)]
        x[~x.isfinite()] = float("nan")
    return seen


def within(context: Callable[[], Any], s: Any) -> Seen:
    s.set_timesteps(5)
    with context():
        return go(s, begin(s))[1]


def no_grad(s: Any) -> Seen:
    return within(torch.no_grad, s)


def autocast(s: Any) -> Seen:
    return within(lambda: torch.autocast("cpu", dtype=torch.bfloat16), s)


@contextlib.contextmanager
def _double_by_default() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def double_by_default(s: Any) -> Seen:
    x = begin(s)
    s.set_timesteps(5)
    with _double_by_default():
        return go(s, x)[1]


@contextlib.contextmanager
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def deterministic(s: Any) -> Seen:
    """PyTorch then fills new memory with NaN, so reads of uninitialized memory show."""
    return within(_deterministic, s)


USES: list[Use] = [
    beta_schedules, ranges_of_beta, betas_of_a_training, lengths_of_training, spacings,
    zero_terminal_snr, prediction_types, variance_types, clamps, thresholds, spacings_of_sigmas,
    solvers, runge_kutta_start, counts_of_steps, timesteps_handed_to_another, saved_and_loaded,
    config_saved_alone, saved_by_torch, compatible_classes, class_checks, attributes_of_the_config,
    history_put_in, place_set_back, begin_index_set, numbers_replaced, method_replaced,
    noise_before_and_in_a_run, scaled_inputs, inner_methods, positional, dtypes,
    parameters_and_subclasses, inputs_stay, not_finite, no_grad, autocast, double_by_default,
    deterministic,
]  # fmt: skip
