"""Launches of kernels by class, to compare what wrappers launch with what the compile gate compiles.

A class is what decides how a kernel is compiled but for sizes: dtypes of its pointers, which of them are not
given, widths of integers, and constants that choose between ways. Launches are seen where the interpreter
runs them. float16 counts as bfloat16: operands of the same width, with the same instructions.
"""

import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from functools import cache
from typing import Any

import torch
import triton.language as tl
from sae_kernels import triton as package
from sae_kernels.triton.launch import INTERPRETING, SHAPES, Case
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

Class = frozenset[tuple[str, str]]

SIZES = {"BLOCK", "BUFFER", "CHUNK", "COLUMNS", "DEPTH", "EACH", "GROUP", "KEPT", "KEYS", "LATENTS"}
SIZES |= {"PIECE", "ROWS", "SALT", "SLOTS", "STEP"}
SIZES |= {"UPCAST", "PTX"}  # which the interpreter alone sets, and alone does without
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.bool: "*i1",
}

assert INTERPRETING, "launches are seen in the interpreter"
true_run = InterpretedFunction.run


def name_of(kernel: InterpretedFunction) -> str:
    return f"{kernel.fn.__module__}.{kernel.__name__}"


def class_of_launch(kernel: InterpretedFunction, args: tuple[Any, ...], options: dict[str, Any]) -> Class:
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {name: value for name, value in options.items() if name in kernel.arg_names}
    constants = _constants(kernel)
    return frozenset(
        (name, _described(value, name in constants)) for name, value in given.items() if name not in SIZES
    )


def class_of_case(case: Case) -> Class:
    constants = _constants(case.kernel)
    given = {name: _described(value, name in constants) for name, value in case.constants.items()}
    given |= {
        name: re.sub(r"tensordesc<(\w+).*", r"descriptor of \1", kind) for name, kind in case.types.items()
    }
    return frozenset((name, text) for name, text in given.items() if name not in SIZES)


def _constants(kernel: InterpretedFunction) -> set[str]:
    annotations = inspect.get_annotations(kernel.fn)
    return {name for name, kind in annotations.items() if kind is tl.constexpr}


def _described(value: Any, constant: bool) -> str:
    if value is None:
        return "not given"
    if constant:
        return str(value.value if isinstance(value, tl.constexpr) else value)
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"descriptor of {TYPES[value.base.dtype][1:]}"
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


@cache
def compiled() -> dict[str, frozenset[Class]]:
    """By kernel, the classes that the compile gate compiles, whatever the GPU."""
    found: dict[str, set[Class]] = defaultdict(set)
    for module in pkgutil.iter_modules(package.__path__):
        cases = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "cases", None)
        for shape in SHAPES if cases else ():
            for case in cases(shape):
                found[name_of(case.kernel)].add(class_of_case(case))
    return {name: frozenset(classes) for name, classes in found.items()}


def checked_run(kernel: InterpretedFunction, *args: Any, **options: Any) -> Any:
    """Run a kernel, if it is one of the package, only as it is compiled by the gate."""
    name = name_of(kernel)
    if name.startswith(package.__name__):
        this = class_of_launch(kernel, args, options)
        known = compiled().get(name, frozenset())
        if this not in known:
            nearest = min(known, key=lambda other: len(this ^ other), default=frozenset())
            raise AssertionError(
                f"{name} is launched in a way that no case of the compile gate has: with "
                f"{dict(sorted(this - nearest))} where the nearest has {dict(sorted(nearest - this))}"
            )
    return true_run(kernel, *args, **options)
