"""Tells what this machine can run, and why not: `hf-flashbsa doctor`.

Exit code 1 where the attention that this machine would use does not run, else 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
from importlib import resources

import torch
import transformers
from packaging.version import Version

from hf_flashbsa import AttentionSpec, attention, choose_backend
from hf_flashbsa.environment import version
from hf_flashbsa.kernels import tuning
from hf_flashbsa.ops.reference import reference_attention

OLDEST_TORCH = "2.9"
OLDEST_GPU = (8, 0)
PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")
#: Importable names of implementations to compare with.
PEERS = {
    "FlexAttention": "torch.nn.attention.flex_attention",
    "FlashAttention-2 (flash-attn)": "flash_attn",
    "FlashAttention-4 (flash_attn.cute)": "flash_attn.cute",
}
#: Largest error of the trial run, in float16 with values of a few units.
TRIAL_ERROR = 2e-2


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _importable(module: str) -> str | None:
    """None, or why not. Extension modules of other packages raise all sorts of errors."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _why_not_triton() -> str | None:
    """Why the Triton back end cannot run here; None where it can."""
    if reason := _importable("triton"):
        return f"{reason}; CUDA builds of torch bring Triton along, others need: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return f"{built}; Triton kernels need one"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_GPU:
        return f"the GPU is sm_{capability[0]}{capability[1]}; kernels need sm_80 (Ampere) or newer"
    return None


def _why_not_hopper(triton: str | None, device: torch.device) -> str | None:
    """Why the Hopper kernels cannot run here; `triton` is why Triton's back end cannot."""
    if triton is not None:
        return "they need the triton back end"
    if not tuning.is_hopper(device):
        return "the GPU is no Hopper (sm_90)"
    return importlib.import_module("hf_flashbsa.kernels.gluon_sm90.dispatch").unavailable_reason(device)


def _trial(backend: str, device: torch.device) -> str | None:
    """Runs a small problem forward and backward; None, or what went wrong."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 80, 64, generator=generator).to(device, torch.float16) for _ in range(3))
    for x in (q, k, v):
        x.requires_grad_()
    spec = AttentionSpec(causal=True)
    try:
        out = attention(q, k, v, spec, backend=backend)
        want, _ = reference_attention(q, k, v, spec)
        got = (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))
        wanted = (want, *torch.autograd.grad(want.square().sum(), (q, k, v)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    largest = max((a.double() - b).abs().max().item() for a, b in zip(got, wanted, strict=True))
    return None if largest <= TRIAL_ERROR else f"wrong results: an error of {largest:.3g} in a trial run"


def _verdict(reason: str | None) -> dict:
    return {"ok": reason is None, "reason": reason}


def examine() -> dict:
    """Everything the command reports, as plain data. `works` is False where attention does not run."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    chosen = choose_backend(device, torch.float16)
    unavailable = {"torch": _trial("torch", torch.device("cpu")), "triton": _why_not_triton()}
    if unavailable["triton"] is None:
        unavailable["triton"] = _trial("triton", device)
    arch = tuning.architecture(device)
    file = resources.files("hf_flashbsa.kernels").joinpath("configs", tuning.file_name(arch))
    gpu = None
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _driver(),
        }
    attentions, masks = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    found = {
        "versions": {
            "hf_flashbsa": importlib.import_module("hf_flashbsa").__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "gpu": gpu,
        "backends": {name: _verdict(reason) for name, reason in unavailable.items()},
        "hopper": _verdict(_why_not_hopper(unavailable["triton"], device)),
        "auto": {"backend": chosen.name, "reason": chosen.reason},
        "registered": {
            name: "with its mask function" if name in masks.valid_keys() else "without a mask function"
            for name in attentions.valid_keys()
            if name.startswith("bsa_")
        },
        "peers": {name: _verdict(_importable(module)) for name, module in PEERS.items()},
        "configuration": {"architecture": arch, "file": str(file)},
        "works": unavailable[chosen.name] is None,
    }
    return found | {"trouble": _trouble(found)}


def _trouble(found: dict) -> list[str]:
    """What to know or to mend, each with its remedy."""
    trouble, auto = [], found["auto"]
    if Version(torch.__version__).release < Version(OLDEST_TORCH).release:
        trouble.append(f"torch {torch.__version__} is older than {OLDEST_TORCH}; run: pip install -U torch")
    if not found["works"]:
        reason = found["backends"][auto["backend"]]["reason"]
        trouble.append(f"attention would run on the {auto['backend']} back end, which cannot: {reason}")
        if found["backends"]["torch"]["ok"]:
            trouble.append('until that is mended, load models with attn_implementation="sdpa"')
    elif auto["backend"] == "torch":
        trouble.append(f"attention runs on the torch back end, which is slow: {auto['reason']}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        trouble.append("TRITON_INTERPRET=1 interprets every kernel, for tests only; unset it to train")
    return trouble


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _print(found: dict) -> None:
    gpu, auto = found["gpu"], found["auto"]["backend"]
    lines = {name: value or "none" for name, value in found["versions"].items()}
    lines["GPU"] = "none" if gpu is None else ", ".join(f"{name} {value}" for name, value in gpu.items())
    for name, verdict in found["backends"].items():
        lines[f"{name} back end"] = _words(verdict, "runs") + (" (in use)" if name == auto else "")
    lines["Hopper kernels"] = _words(found["hopper"], "run")
    for name, how in found["registered"].items():
        lines[f'attn_implementation="{name}"'] = f"registered {how}"
    lines["launch configurations"] = found["configuration"]["file"]
    for name, verdict in found["peers"].items():
        lines[name] = _words(verdict, "can be imported")
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    for line in found["trouble"]:
        print(f"! {line}")


def _words(verdict: dict, good: str) -> str:
    return good if verdict["ok"] else f"no: {verdict['reason']}"


def main(options: argparse.Namespace) -> int:
    found = examine()
    print(json.dumps(found, indent=1)) if options.json else _print(found)
    return 0 if found["works"] else 1
