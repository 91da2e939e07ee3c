"""Where programs run, and how they are compiled for it."""

import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import jax

from jchain._typing import PyTree
from jchain.problem import Problem
from jchain.pytree import is_concrete

P = ParamSpec("P")
T = TypeVar("T")

# Share of the device's memory that is used where no limit is given. Not of what is free at the moment, which would make
# another plan, and a new trace, of the same call.
_MEMORY_SHARE = 0.25
_CPU_INFO = Path("/proc/cpuinfo")


@cache
def compiler_options(backend: str) -> dict[str, str]:
    """Options for `jax.jit` around an evaluation, as `evaluate` itself passes them where it is not traced.

    XLA hands products and convolutions of 24 channels or more to YNNPACK on CPU, which on x86 takes longer than its Eigen
    kernels. With AVX2: 3x3 of 32 channels on 32x32 10.8 and 5.7 ms, 512 chains of 64-wide MLPs 140 and 115 ms. With
    AVX-512: 128 chains of such convolutions 2.6 and 1.5 s, of MLPs 39 and 33 ms, and of 512-wide ones alike. So only
    reductions are left to it there; other processors keep XLA's choice.
    """
    flags = _CPU_INFO.read_text() if backend == "cpu" and _CPU_INFO.exists() else ""
    if "avx2" not in flags:
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # a jaxlib that does not know this experimental option
        return {}
    return options


def find_backend(problem: Problem, *arrays: PyTree) -> str:
    """The platform of the devices on which a problem and other arrays lie, else the default one.

    Raises:
      ValueError: they lie on different devices.
    """
    devices = {
        frozenset(leaf.devices())
        for leaf in jax.tree.leaves((problem, arrays))
        if isinstance(leaf, jax.Array) and is_concrete(leaf) and leaf.committed
    }
    if len(devices) > 1:
        places = " and ".join(sorted(str(sorted(map(str, place))) for place in devices))
        raise ValueError(
            f"expected bank, data and chains on the same devices, got them on {places}"
        )
    used = problem.mesh.devices.flat if problem.mesh is not None else next(iter(devices), ())
    return next((device.platform for device in used), jax.default_backend())


def default_memory_limit() -> int:
    """A quarter of the memory of the first local device, in bytes."""
    stats = jax.local_devices()[0].memory_stats()
    total = (
        stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return int(total * _MEMORY_SHARE)


def jit_for_problem(
    static_argnames: Sequence[str] = (),
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: `jax.jit` for a function of a problem, with the compiler options of the problem's backend.

    Names are dropped from the problem, so that banks that differ only in names share one program. Inside another
    transformation the options are left out, because only the outermost `jit` may have them.

    Args:
      static_argnames: as for `jax.jit`; these arguments must be passed by keyword.

    Raises:
      ValueError: by the function returned: its arrays lie on different devices.
    """

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        @cache
        def compile_for(backend: str | None) -> Callable[P, T]:
            options = None if backend is None else compiler_options(backend)
            return jax.jit(fn, static_argnames=tuple(static_argnames), compiler_options=options)

        @wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            bare = tuple(arg.without_names() if isinstance(arg, Problem) else arg for arg in args)
            problem = next(arg for arg in bare if isinstance(arg, Problem))
            backend = find_backend(problem, bare) if is_concrete(bare) else None
            return compile_for(backend)(*bare, **kwargs)  # pyright: ignore[reportCallIssue]

        return call

    return decorate
