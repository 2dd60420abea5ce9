"""``python -m pcg_compile doctor``."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from pcg_compile.__main__ import main
from pcg_compile.report import doctor
from pcg_compile.report.doctor import Check

NAMES = [
    "python", "torch", "torch's private parts", "gpu", "backend", "scalar writes", "inductor", "attention", "depyf",
    "safetensors", "transformers",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_as_a_command():
    run = subprocess.run(
        [sys.executable, "-m", "pcg_compile", "doctor", "--json"], capture_output=True, text=True, env=dict(os.environ)
    )
    report = json.loads(run.stdout)
    assert run.returncode == 0 and report["ok"] is True, run.stdout + run.stderr
    assert [check["name"] for check in report["checks"]] == NAMES
    assert all(set(check) == {"name", "status", "found", "cure"} for check in report["checks"])
    assert report["checks"][1]["found"].startswith(torch.__version__)


def test_one_line_a_check(monkeypatch):
    console = Console(file=io.StringIO(), soft_wrap=True, width=40)
    assert doctor.run_doctor(console=console) == 0
    lines = console.file.getvalue().splitlines()
    assert len(lines) == len(NAMES) + 1 and lines[-1] == "pcg works on this machine."
    for name, line in zip(NAMES, lines, strict=False):
        assert line.split(maxsplit=1)[0] in ("ok", "warn") and line[5:].startswith(name)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_exit_code(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("thing", status, "found", "pip install [thing]"),))
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["ok"] is (code == 0)
    assert main(["doctor"]) == code
    assert "-> pip install [thing]" in capsys.readouterr().out


def test_a_check_that_raises(monkeypatch):
    def gpu_like():
        raise RuntimeError("first line\nsecond line")

    assert doctor.diagnose([gpu_like]) == [Check("gpu like", "warn", "RuntimeError: first line", doctor._REPORT)]
    monkeypatch.setattr(doctor, "_ESSENTIAL", (gpu_like,))
    assert doctor.diagnose([gpu_like])[0].status == "fail"


def test_an_old_torch_fails(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    check = doctor._torch()
    assert check.status == "fail" and "torch>=2.11" in check.cure


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    check = doctor._depyf()
    assert (check.status, check.cure) == ("warn", "pip install depyf")
    assert ".[transformers]" in doctor._transformers().cure


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    check = doctor._inductor()
    assert check.status == "warn" and "a C++ compiler" in check.found and "g++" in check.cure
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: "/nonexistent")
    assert "Python's headers" in doctor._inductor().found


def test_the_wrong_numbers_fail(monkeypatch):
    monkeypatch.setattr(doctor, "_rows", lambda x: x + torch.rand(()).to(x.device))
    assert doctor._backend().status == "fail"


def test_no_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2 and "doctor" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu():
    checks = {check.name: check for check in doctor.diagnose()}
    assert torch.cuda.get_device_name(0) in checks["gpu"].found
    assert checks["backend"].found == "CUDA graphs capture on cuda"
    assert checks["attention"].status != "fail"
