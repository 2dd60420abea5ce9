"""What this machine can do for pcg: one check a line, with the cure for each that fails."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.text import Text

__all__ = ["CHECKS", "Check", "diagnose", "run_doctor"]

_OLDEST_TORCH = (2, 11)
_REPORT = "report it, with the output of: python -m pcg_compile doctor --json"
_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was checked.
        status: "ok"; "warn" where something optional is missing or slow; "fail" where an essential does not work.
        found: what is there.
        cure: what to install or set; None where nothing need be done.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    cure: str | None = None


def diagnose(checks: Sequence[Callable[[], Check]] | None = None) -> list[Check]:
    """Runs all checks; one that raises is a failed one. Nothing is installed or changed."""
    return [_guarded(check) for check in (CHECKS if checks is None else checks)]


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        # What Dynamo wraps says more than the wrapper.
        cause = getattr(error, "inner_exception", None) or error
        status: Literal["warn", "fail"] = "fail" if check in _ESSENTIAL else "warn"
        return Check(check.__name__.strip("_").replace("_", " "), status, _short(cause), _REPORT)


def run_doctor(as_json: bool = False, console: Console | None = None) -> int:
    """Prints the findings.

    Args:
        as_json: one object ``{"ok": bool, "checks": [{"name", "status", "found", "cure"}]}`` instead of lines.
        console: where to print; standard output where None.

    Returns:
        0 where no essential fails, else 1.
    """
    checks = diagnose()
    works = all(check.status != "fail" for check in checks)
    if as_json:
        print(json.dumps({"ok": works, "checks": [asdict(check) for check in checks]}, indent=2))
        return 0 if works else 1
    console = console or Console(soft_wrap=True, highlight=False)
    width = max(len(check.name) for check in checks)
    for check in checks:
        console.print(_line(check, width))
    summary = "pcg works on this machine." if works else "pcg does not work on this machine: see the lines marked fail."
    console.print(Text(summary, style="bold green" if works else "bold red"))
    return 0 if works else 1


def _line(check: Check, width: int) -> Text:
    line = Text(f"{check.status:4} ", style=_STYLES[check.status])
    line.append(f"{check.name:{width}}  ", style="bold")
    line.append(check.found, style="default")
    if check.cure is not None:
        line.append(f"  -> {check.cure}", style="cyan")
    return line


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Check:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    found = f"{torch.__version__}, {build}"
    if version < _OLDEST_TORCH:
        return Check("torch", "fail", found, 'pip install "torch>=2.11"')
    return Check("torch", "ok", found)


def _private_names() -> Check:
    """Whether torch still has the private parts that pcg reads."""
    from ..torch_compat.probe import declared, missing

    absent = missing()
    if absent:
        cure = f"install a torch of the versions in parentheses, or {_REPORT}"
        return Check("torch's private parts", "fail", f"this torch lacks {', '.join(absent)}", cure)
    return Check("torch's private parts", "ok", f"all {len(declared())} names that pcg uses are there")


def _gpu() -> Check:
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        found = "; ".join(_describe_gpu(index) for index in devices)
        return Check("gpu", "ok", found)
    if _has_nvidia_driver():
        if torch.version.cuda is None:
            return Check("gpu", "warn", "an NVIDIA driver is there, but torch is a CPU build",
                         "install torch built for CUDA: pip install --force-reinstall torch")  # fmt: skip
        return Check("gpu", "warn", "torch built for CUDA cannot use the NVIDIA driver",
                     "update the driver, or unset CUDA_VISIBLE_DEVICES")  # fmt: skip
    return Check("gpu", "ok", "none: pieces are replayed on the CPU, for development and tests")


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"


def _has_nvidia_driver() -> bool:
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def _backend() -> Check:
    """Compiles a function, captures it and replays it at two sizes, on the GPU where there is one."""
    import pcg_compile

    if "pcg" not in torch.compiler.list_backends():
        cure = "in a checkout of pcg: pip install ."
        return Check("backend", "fail", 'torch.compile does not know backend="pcg"', cure)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    function = pcg_compile.piecewise(buckets=[4], compiler="eager")(_rows)
    with torch.no_grad():
        for rows in (3, 4):
            x = torch.arange(rows * 2.0, device=device).view(rows, 2)
            if not torch.equal(function(x), _rows(x)):
                return Check("backend", "fail", f"wrong values on {device}", _REPORT)
    stats = pcg_compile.stats(function)
    if not stats.replays:
        reason = stats.fallbacks[0].reason if stats.fallbacks else "no reason was given"
        return Check("backend", "fail", f"nothing was captured on {device}: {reason}", _REPORT)
    return Check("backend", "ok", f"{'CUDA graphs capture' if device == 'cuda' else 'static replays run'} on {device}")


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.mul(2).add(1).relu()


def _scalar_writes() -> Check:
    from ..passes.scalar_writes import host_scalar_write

    if host_scalar_write() == "fills":
        return Check("scalar writes", "ok", "`t[0] = 0` fills on the device: a captured graph may hold it")
    return Check("scalar writes", "ok", "`t[0] = 0` copies from the host: pcg names the line, or rewrites it")


def _compilers() -> Iterator[tuple[str, bool]]:
    """What Inductor needs on this machine, and whether it is there."""
    if torch.cuda.is_available():
        yield "triton", importlib.util.find_spec("triton") is not None
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    yield "a C++ compiler", any(name and shutil.which(name.split()[0]) for name in names)
    yield "Python's headers", os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))


def _inductor() -> Check:
    missing = [name for name, there in _compilers() if not there]
    cures = {
        "triton": "pip install triton",
        "a C++ compiler": "apt-get install g++",
        "Python's headers": "apt-get install python3-dev",
    }
    if missing:
        return Check("inductor", "warn", f"lacks {' and '.join(missing)}: pieces would run eagerly, counted",
                     " and ".join(cures[name] for name in missing))  # fmt: skip
    version = _version("triton")
    return Check("inductor", "ok", f"has what it needs{f', triton {version}' if version else ''}")


def _attention() -> Check:
    """What computes paged attention here, and whether FlashInfer could (``attention_backend="flashinfer"``)."""
    if not torch.cuda.is_available():
        return Check("attention", "ok", "runs in plain PyTorch without a GPU")
    from ..attention import AttentionShape, choose_impl
    from ..attention.reference import ReferenceAttention

    shape = AttentionShape(32, 8, 128, None, None, 128**-0.5, torch.bfloat16)
    kind, reason = choose_impl(shape, torch.device("cuda", torch.cuda.current_device()))
    if kind is ReferenceAttention:
        command = re.search(r"\(((?:pip|apt) install [^)]+)\)", reason or "")
        cure = command[1] if command is not None else None
        return Check("attention", "warn", f"would run in plain PyTorch: {reason}", cure)
    return Check("attention", "ok", f"by {kind.__name__} (Triton {_version('triton')}); {_flashinfer()}")


def _flashinfer() -> str:
    version = _version("flashinfer-python")
    if not version:
        return "FlashInfer, an option, is not installed"
    tools = {"nvcc": _nvcc() is not None, "ninja": _has_ninja()}
    missing = [tool for tool, there in tools.items() if not there]
    if missing and not importlib.util.find_spec("flashinfer_jit_cache"):
        return f"FlashInfer {version}, an option, lacks {' and '.join(missing)} to build its kernels with"
    archs = os.environ.get("FLASHINFER_CUDA_ARCH_LIST") or "this GPU's"
    return f"FlashInfer {version} is an option, architectures: {archs}"


def _nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and os.access(os.path.join(home, "bin", "nvcc"), os.X_OK):
            return os.path.join(home, "bin", "nvcc")
    return shutil.which("nvcc")


def _has_ninja() -> bool:
    beside_python = os.path.join(os.path.dirname(sys.executable), "ninja")
    return shutil.which("ninja") is not None or os.access(beside_python, os.X_OK)


def _depyf() -> Check:
    return _importable("depyf", "depyf", "pcg.dump() decompiles what Dynamo made", "pip install depyf")


def _safetensors() -> Check:
    return _importable("safetensors", "safetensors", "LoRA adapters are read with it", "pip install safetensors")


def _transformers() -> Check:
    version = _version("transformers")
    cure = "in a checkout of pcg: pip install '.[transformers]'"
    if version is not None and int(version.split(".")[0]) < 5:
        return Check("transformers", "warn", f"{version}: the integration needs 5 or newer", cure)
    return _importable("transformers", "transformers", 'attn_implementation="pcg"', cure)


def _importable(module: str, distribution: str, purpose: str, cure: str) -> Check:
    if importlib.util.find_spec(module) is None:
        return Check(distribution, "warn", f"not installed ({purpose})", cure)
    try:
        importlib.import_module(module)
    except Exception as error:
        return Check(distribution, "warn", f"cannot be imported: {_short(error)}", f"{cure} --force-reinstall")
    return Check(distribution, "ok", f"{_version(distribution) or 'installed'} ({purpose})")


def _version(distribution: str) -> Any:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


#: In the order they are printed.
CHECKS: tuple[Callable[[], Check], ...] = (
    _python, _torch, _private_names, _gpu, _backend, _scalar_writes, _inductor, _attention, _depyf, _safetensors,
    _transformers,
)  # fmt: skip
_ESSENTIAL = (_python, _torch, _private_names, _backend)
