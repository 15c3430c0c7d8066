"""From a recorded launch to a compiled kernel for a GPU that need not be here, and to the hash of what went in.

Triton's own binder turns the arguments into types, specialised integers and alignments, as it would at a real launch
(tensors of the meta device answer data_ptr() with their offset from an aligned allocation). It is not a public
interface; written anew here, the rules could drift from what a GPU is asked to run, and nothing would show it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ldm_kernels.common.launch import Launch

# Multi-block clusters: Triton 3.6 fails to compile the reductions across a cluster's blocks.
CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


@dataclass(frozen=True)
class Compilation:
    """One compilation: equal hashes are equal binaries, however many shapes ask for it."""

    launch: Launch
    architecture: int
    signature: dict[str, str]  # by parameter: a type, or "constexpr"
    constants: dict[tuple[int, ...], Any]  # by position: constants, None, and integers equal to 1
    attributes: dict[tuple[int, ...], Any]  # by position: what is divisible by 16
    options: dict[str, Any]
    hash: str  # of source, constants, signature, options, architecture and Triton's version

    @property
    def kernel(self) -> str:
        return str(self.launch.kernel.__name__)

    def compiled(self) -> Any:
        """Triton's compiled kernel (its own cache answers when nothing changed)."""
        source = ASTSource(self.launch.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=_target(self.architecture), options=self.options)


def specialize(launch: Launch, architecture: int) -> Compilation:
    """The compilation that Triton's runtime would make for this launch on a GPU of that architecture.

    Raises: TypeError if the kernel is interpreted (TRITON_INTERPRET was set when it was defined).
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"{getattr(kernel, '__name__', kernel)} is a {type(kernel).__name__}, which cannot be compiled; "
            "unset TRITON_INTERPRET and start again"
        )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.num_ctas > 1:
        options["num_ctas"] = launch.num_ctas
    keywords = {**launch.arguments, **launch.constants, **options}
    backend = make_backend(_target(architecture))
    bound, specialization, extra = _binder(kernel, architecture)(**keywords)
    parsed, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, extra)
    names = list(signature)
    inputs = {
        "source": source_of(kernel),
        "constants": [(names[path[0]], repr(value)) for path, value in sorted(constants.items())],
        "signature": signature,
        "attributes": [(names[path[0]], value) for path, value in sorted(attributes.items()) if value],
        "options": options,
        "architecture": architecture,
        "triton": triton.__version__,
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    return Compilation(launch, architecture, signature, constants, attributes, dict(parsed.__dict__), digest)


def source_of(kernel: Any) -> str:
    """The code of a jit function and of all that it calls, with the constants that they read; comments left out.

    Triton's own key of a source also has its line number in the file: an import above a kernel would change it.
    """
    seen: dict[str, str] = {}
    _collect(kernel, seen)
    return "\n".join(seen[name] for name in sorted(seen))


def _collect(function: Any, seen: dict[str, str]) -> None:
    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name in seen:
        return
    seen[name], mentioned = _parsed(function.src)
    scope = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
    for dotted in mentioned:
        value = _resolve(dotted, scope)
        if isinstance(value, JITFunction) and not value.fn.__module__.startswith("triton."):
            _collect(value, seen)
        elif isinstance(value, (triton.language.constexpr, bool, int, float, str)):
            seen[f"{name}: {dotted}"] = f"{dotted} = {value!r}"


@functools.cache
def _parsed(source: str) -> tuple[str, tuple[str, ...]]:
    """A function's code without comments and docstring, and the names in it that may come from outside."""
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:] or [ast.Pass()]
    names = {_dotted(node) for node in ast.walk(definition)}
    return ast.unparse(definition), tuple(sorted(names - {""}))


def _dotted(node: ast.AST) -> str:
    """A name, or the attributes of one as in module.function; else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    owner = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if isinstance(node, ast.Attribute) and owner else ""


def _resolve(dotted: str, scope: dict[str, Any]) -> Any:
    """What the name stands for at the top level of the file, through modules alone; None if nothing."""
    first, *rest = dotted.split(".")
    value = scope.get(first)
    for attribute in rest:
        value = getattr(value, attribute, None) if isinstance(value, ModuleType) else None
    return value


@functools.cache
def _target(architecture: int) -> GPUTarget:
    return GPUTarget("cuda", architecture, 32)


@functools.cache
def _binder(kernel: Any, architecture: int) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(_target(architecture)))
