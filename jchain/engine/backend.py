"""Compiler options and memory limits of the backend that runs the programs."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax

from jchain._typing import PyTree
from jchain.arguments import checked
from jchain.problem import Problem
from jchain.pytree import is_concrete

P = ParamSpec("P")
T = TypeVar("T")

# The fraction of the total memory that may be used if no limit is given. It is not a fraction of
# the free memory, which varies between calls: the same call could get another plan and be traced
# again.
_MEMORY_SHARE = 0.25
_CPU_INFO = Path("/proc/cpuinfo")
# Files that hold the memory limit of a container: cgroup v2, then v1.
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

# On CPU, a program maps some hundred regions of memory. Linux kills a process that maps more than
# 65,530.
_MAX_PROGRAMS = 64
# The first sizes of populations have programs of their own, and later ones that are used often.
_FIRST_SIZES, _MOST_SIZES, _OFTEN = 2, 4, 16


class _Programs:
    """The functions that `jit_for_problem` compiled, and the number of their programs."""

    def __init__(self) -> None:
        self.functions: list[Any] = []
        self.number = 0
        self.was_used = False
        self.is_forked = False
        self._sizes: set[int] = set()
        self._uses: Counter[int] = Counter()

    def has_own(self, size: int) -> bool:
        """Return whether a size of populations has its own program, which the caller then uses."""
        self._uses[size] += 1
        most = _MOST_SIZES if self._uses[size] >= _OFTEN else _FIRST_SIZES
        if len(self._sizes) < most:
            self._sizes.add(size)
        return size in self._sizes

    def clear(self) -> None:
        self.number = 0
        self._sizes.clear()
        self._uses.clear()
        for function in self.functions:
            function.clear_cache()


_programs = _Programs()


def _note_fork() -> None:
    _programs.is_forked = _programs.was_used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def check_not_forked() -> None:
    """Check that this process is not a fork of one that has computed something.

    Raises:
      RuntimeError: if it is. JAX's threads do not exist in a fork, which would wait for them.
    """
    if _programs.is_forked:
        raise RuntimeError(
            "expected a process that was started anew, got a fork of one in which JAX has "
            "computed: use multiprocessing.get_context('spawn'), or fork before the first "
            "computation"
        )
    _programs.was_used = True


def has_own_program(size: int) -> bool:
    """Return whether populations of this size have their own program; others are padded.

    Padding takes longer than the evaluation of small layers, but each program takes memory.

    Args:
      size: the number of chains.
    """
    return _programs.has_own(size)


def clear_caches() -> None:
    """Drop the compiled programs of evaluations and of the steps of searches, to free memory.

    They are compiled again when they are next needed. jchain does this itself after every 64
    programs. `jax.clear_caches()` drops all programs of the process.
    """
    _programs.clear()


@checked
@cache
def compiler_options(backend: str) -> dict[str, str]:
    """Return compiler options for a `jax.jit` around an evaluation.

    `evaluate` passes these options itself unless it is called inside another transformation.

    On CPU, XLA gives matrix products and convolutions of 24 or more channels to YNNPACK, whose
    kernels are slower on x86 than XLA's Eigen kernels. With AVX2, a 3x3 convolution of 32 channels
    on 32x32 takes 10.8 ms instead of 5.7 ms, and 512 chains of 64-wide MLPs take 140 ms instead of
    115 ms. With AVX-512, 128 chains of such convolutions take 2.6 s instead of 1.5 s, the MLPs take
    39 ms instead of 33 ms, and 512-wide MLPs show no difference. On x86, YNNPACK is therefore used
    only for reductions. Other processors keep XLA's default.

    XLA also moves what does not change out of loops. For a pretrained transformer, that is a copy
    of weights, which one chain pays for in full: on 8 sequences of 128 tokens, one chain of the 28
    blocks of SmolLM2-135M takes 7.9 s, and 1.0 s without this pass (AVX-512). 22 such chains, 512
    chains of MLPs, 48 of convolutions, and searches show no difference. The pass is left out on
    CPU.

    Args:
      backend: the name of the platform, as returned by `jax.default_backend()`.
    """
    if backend != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    flags = _CPU_INFO.read_text() if _CPU_INFO.exists() else ""
    if "avx2" not in flags:
        return options
    more = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda: 0, compiler_options=options | more).lower().compile()
    except jax.errors.JaxRuntimeError:  # this jaxlib does not have the experimental option
        return options
    return options | more


def get_backend(problem: Problem, *arrays: PyTree) -> str:
    """Return the platform of the devices that hold a problem and other arrays.

    If no array is committed to a device, this is JAX's default platform.

    Args:
      problem: the bank, the split of data, and the loss.
      *arrays: pytrees of arrays. Traced arrays are ignored.

    Raises:
      ValueError: if the arrays are on different devices.
    """
    devices = {
        frozenset(leaf.devices())
        for leaf in jax.tree.leaves((problem, arrays))
        if isinstance(leaf, jax.Array) and is_concrete(leaf) and leaf.committed
    }
    if len(devices) > 1:
        names = " and ".join(sorted(str(sorted(map(str, group))) for group in devices))
        raise ValueError(
            f"expected bank, data, and chains on the same devices, got them on {names}"
        )
    used = problem.mesh.devices.flat if problem.mesh is not None else next(iter(devices), ())
    return next((device.platform for device in used), jax.default_backend())


def default_memory_limit() -> int:
    """Return a quarter of the memory of the first local device, in bytes.

    On CPU, this is a quarter of the machine's memory or, if it is lower, of the container's limit.
    """
    stats = jax.local_devices()[0].memory_stats()
    total = stats["bytes_limit"] if stats else min([_get_host_memory(), *_read_cgroup_limits()])
    return int(total * _MEMORY_SHARE)


def _get_host_memory() -> int:
    """Return the machine's memory in bytes."""
    try:
        import psutil
    except ImportError:  # psutil is a dependency, but `pip install --no-deps` omits it
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return psutil.virtual_memory().total


def _read_cgroup_limits() -> list[int]:
    """Return the memory limits of this container in bytes."""
    texts = [path.read_text().strip() for path in _CGROUP_LIMITS if os.access(path, os.R_OK)]
    # Version 2 writes "max" if there is no limit.
    return [int(text) for text in texts if text.isdigit()]


def jit_for_problem(
    static_argnames: Sequence[str] = (),
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that compiles a function of a problem for the problem's backend.

    It is `jax.jit` with the compiler options of that backend. Names are dropped from the problem,
    so that banks that differ only in names share one program. Inside another transformation, the
    options are left out, because only the outermost `jit` may have them.

    Args:
      static_argnames: the names of static arguments, as for `jax.jit`. Pass these arguments by
        keyword, and the problem by position.

    Raises:
      ValueError: raised by the decorated function if its arrays are on different devices.
    """

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        @cache
        def compile_for(backend: str | None) -> Callable[P, T]:
            options = None if backend is None else compiler_options(backend)

            @wraps(fn)
            def trace(*args: P.args, **kwargs: P.kwargs) -> T:
                _programs.number += backend is not None  # each program is traced once
                return fn(*args, **kwargs)

            names = tuple(static_argnames)
            compiled = jax.jit(trace, static_argnames=names, compiler_options=options)
            _programs.functions.append(compiled)
            return compiled

        @wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            check_not_forked()
            bare = tuple(arg.without_names() if isinstance(arg, Problem) else arg for arg in args)
            problem = next(arg for arg in bare if isinstance(arg, Problem))
            others = [arg for arg in bare if arg is not problem]
            backend = get_backend(problem, others) if is_concrete(bare) else None
            if backend is not None and _programs.number >= _MAX_PROGRAMS:
                _programs.clear()
            return compile_for(backend)(*bare, **kwargs)  # pyright: ignore[reportCallIssue]

        return call

    return decorate
