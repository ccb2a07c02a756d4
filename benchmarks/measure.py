"""Measure time, memory and the machine's ceilings, and print markdown tables; shared by the benchmarks."""

import gc
import os
import platform
import statistics
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIB = 2**20


class Skip(Exception):
    """Raised by a method that can't run here; the message says why."""


# Environment


def environment(device: torch.device) -> Dict[str, Any]:
    """Hardware and versions, for the line above a table and for the JSON file."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = 'none'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        policy = os.environ.get('OMP_WAIT_POLICY', 'default')
        name = f'{_cpu_name()}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY {policy}'
    return dict(
        device=name,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or 'none',
        triton=triton_version,
        timm=timm.__version__,
    )


def _cpu_name() -> str:
    with suppress(OSError), open('/proc/cpuinfo') as f:
        for line in f:
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def environment_line(device: torch.device) -> str:
    env = environment(device)
    return f'{env.pop("device")}, ' + ', '.join(f'{k} {v}' for k, v in env.items())


# Work


class TrainStep:
    """Forward, cross-entropy and backward, with new gradients each time; the optimiser's step too if there is one."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        target: Tensor,
        amp_dtype: Optional[torch.dtype] = None,
        optimizer: Optional[torch.optim.Optimizer] = None,
    ):
        self.model, self.inputs, self.target = model, inputs, target
        self.amp_dtype, self.optimizer = amp_dtype, optimizer
        self.leaves: List[Tensor] = [inputs, *model.parameters()]

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> None:
        self.clear()
        with autocast(self.inputs.device, self.amp_dtype):
            loss = F.cross_entropy(self.model(self.inputs), self.target)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()


class EvalStep:
    """Forward without gradients."""

    def __init__(self, model: nn.Module, inputs: Tensor, amp_dtype: Optional[torch.dtype] = None):
        self.model, self.inputs, self.amp_dtype = model, inputs, amp_dtype
        self.leaves: List[Tensor] = [inputs, *model.parameters(), *model.buffers()]

    def clear(self) -> None:
        pass

    def __call__(self) -> None:
        with torch.no_grad(), autocast(self.inputs.device, self.amp_dtype):
            self.model(self.inputs)


def autocast(device: torch.device, dtype: Optional[torch.dtype]) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


# Timing


@dataclass
class Timed:
    """A method and what was measured of it; ``error`` says why there is nothing."""

    name: str
    step: Optional[Callable[[], Any]] = None
    clear: Callable[[], Any] = lambda: None
    wall: List[float] = field(default_factory=list)  # ms a step, one entry a round
    events: List[float] = field(default_factory=list)  # ms of single steps between CUDA events
    peak: Optional[float] = None  # MiB
    total: Optional[float] = None  # MiB
    error: Optional[str] = None
    info: Dict[str, Any] = field(default_factory=dict)
    keep: Any = None  # what must live as long as the step

    @property
    def ms(self) -> Optional[float]:
        return statistics.median(self.wall) if self.wall else None

    def ratio(self, other: 'Timed') -> Optional[float]:
        """Median over the rounds of this method's time over the other's in the same round."""
        ratios = [a / b for a, b in zip(self.wall, other.wall, strict=False)]
        return statistics.median(ratios) if ratios else None

    def record(self, **fields: Any) -> Dict[str, Any]:
        """The measurement as a row for the JSON file."""
        events = statistics.median(self.events) if self.events else None
        row = dict(fields, method=self.name, ms=self.ms, ms_rounds=self.wall, ms_events=events)
        return dict(row, peak_mib=self.peak, total_mib=self.total, error=self.error, **self.info)


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def release() -> None:
    gc.collect()
    with suppress(Exception):  # after a CUDA error, of which the method's row tells
        torch.cuda.empty_cache()


def describe(error: BaseException) -> str:
    """One line that fits a table's cell."""
    text = ' '.join(str(error).split()).replace('|', '/')
    return f'skipped: {text}' if isinstance(error, Skip) else f'{type(error).__name__}: {text[:110]}'


def prepare(name: str, build: Callable[[], Any], device: torch.device) -> Timed:
    """Build a method's step, warm it up and measure the memory of one step; an error ends up in the result."""
    timed, step = Timed(name), None
    try:
        step = build()
        timed.info['impl'] = impl_of(step.model)
        for _ in range(3):
            start = time.perf_counter()
            step()
            synchronize(device)
            if time.perf_counter() - start > 0.5:  # it compiled, or it is slow anyway
                step()
                break
        timed.peak, timed.total = memory_of(step, device)
        timed.step, timed.clear = step, step.clear
    except Exception as e:
        timed.error = describe(e)
    if timed.error:
        del step  # or its memory would stay
        release()
    return timed


def impl_of(model: nn.Module) -> Optional[str]:
    """Return what computes the logits of the ZZZ head in the model."""
    return next((m.active_impl for m in model.modules() if hasattr(m, 'active_impl')), None)


def memory_of(step: Any, device: torch.device) -> Tuple[Optional[float], Optional[float]]:
    """MiB at the peak of one step above parameters and inputs, gradients included; and with parameters and inputs."""
    if device.type != 'cuda':
        return None, None
    step.clear()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    peak = (torch.cuda.max_memory_allocated(device) - before) / MIB
    step.clear()
    return peak, peak + sum(t.numel() * t.element_size() for t in step.leaves) / MIB


def capture(timed: Timed, device: torch.device) -> Timed:
    """The same step as a CUDA graph, its gradients in the graph's memory."""
    # A graph reads the memory of parameters and inputs without holding them
    graphed = Timed(timed.name, error=timed.error, info=dict(timed.info), keep=timed.step)
    if timed.step is None:
        return graphed
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                timed.step()
        torch.cuda.current_stream(device).wait_stream(stream)
        timed.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            timed.step()
        timed.clear()
        graph.replay()
        torch.cuda.synchronize(device)
        graphed.step = graph.replay
    except Exception as e:
        graphed.error = describe(e)
        with suppress(Exception):  # a broken capture leaves the generator in capture mode
            fresh = torch.Generator(device)
            torch.cuda.default_generators[device.index or 0].graphsafe_set_state(fresh.graphsafe_get_state())
    return graphed


def interleave(
    methods: Sequence[Timed],
    device: torch.device,
    rounds: int = 5,
    round_s: float = 0.1,
    max_steps: int = 50,
    total_s: float = 2.0,
    with_events: bool = True,
) -> None:
    """Time the methods in turn, round after round, so that a drift of the machine hits all of them alike.

    In a round a method makes as many steps as fit in ``round_s``, with one synchronisation at the end; one that has
    used up ``total_s`` (the reference) sits out the later rounds.
    """
    steps: Dict[int, int] = {}
    for _ in range(rounds):
        for method in methods:
            n = steps.get(id(method), 0)
            if method.step is None or sum(method.wall) * n / 1e3 > total_s:
                continue
            try:
                if not n:
                    n = steps[id(method)] = _steps_in(method.step, device, round_s, max_steps)
                method.wall.append(_wall_ms(method.step, device, n))
                if with_events and device.type == 'cuda':
                    method.events += _event_ms(method.step, device, min(20, n))
            except Exception as e:
                method.step, method.wall, method.events, method.error = None, [], [], describe(e)
                release()
            method.clear()


def _steps_in(step: Callable[[], Any], device: torch.device, seconds: float, max_steps: int) -> int:
    ms = _wall_ms(step, device, 2)
    return max(1, min(max_steps, int(seconds * 1e3 / ms)))


def _wall_ms(step: Callable[[], Any], device: torch.device, n: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n):
        step()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / n


def _event_ms(step: Callable[[], Any], device: torch.device, n: int) -> List[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for start, end in pairs:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs]


# Ceilings


def ceilings(device: torch.device, quick: bool = False) -> Tuple[float, float]:
    """Measured bytes/s of a copy (read plus write) and FLOP/s of a large matrix product, bf16 on a GPU."""
    cuda = device.type == 'cuda'
    size, n = (2**24, 512) if quick else (2**30, 8192) if cuda else (2**28, 2048)
    return copy_rate(size, device), product_rate(n, torch.bfloat16 if cuda else torch.float32, device)


def copy_rate(size: int, device: torch.device) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_ms(lambda: target.copy_(source), device) * 1e3


def product_rate(n: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best_ms(lambda: torch.mm(a, b, out=out), device) * 1e3


def _best_ms(step: Callable[[], Any], device: torch.device) -> float:
    _wall_ms(step, device, 5)
    return min(_wall_ms(step, device, 10) for _ in range(5))


def free_memory(device: torch.device) -> int:
    if device.type == 'cuda':
        release()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


# Tables


class Table:
    """A markdown table printed row by row, so that a run that is cut off has shown what it measured."""

    def __init__(self, title: str, device: torch.device, columns: Sequence[str], caption: str = ''):
        print(f'\n### {title}\n\n{environment_line(device)}\n')
        if caption:
            print(f'{caption}\n')
        self.columns = list(columns)
        print('| ' + ' | '.join(columns) + ' |')
        print('|' + '---|' * len(columns), flush=True)

    def row(self, cells: Iterable[Any]) -> None:
        cells = ['' if c is None else str(c) for c in cells]
        cells += [''] * (len(self.columns) - len(cells))
        print('| ' + ' | '.join(cells) + ' |', flush=True)


def number(value: Optional[float], digits: int = 3) -> str:
    """With this many significant digits, without an exponent for what a table holds."""
    if value is None:
        return ''
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f'{value:.2g}'
    text = f'{value:.{digits}g}'
    return f'{value:.0f}' if 'e' in text else text


def span(values: Sequence[float]) -> str:
    return f'{number(min(values))}-{number(max(values))}' if values else ''
