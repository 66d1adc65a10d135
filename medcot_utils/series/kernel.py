"""Check the notebooks' Jupyter kernel before one is started."""

from __future__ import annotations

import shutil
import subprocess
import sys

from medcot_utils.errors import PlatformError

KERNEL = "python3"


def check_kernel() -> None:
    """Raise PlatformError unless the interpreter of the kernelspec exists and has the module to start.

    Jupyter itself would only say that the kernel died."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        spec = KernelSpecManager().get_kernel_spec(KERNEL)
    except NoSuchKernel:
        raise PlatformError(f"there is no Jupyter kernel {KERNEL}: pip install ipykernel, for {sys.executable}") from None
    program, *arguments = spec.argv or [""]
    if program in ("python", "python3"):  # Jupyter then uses this interpreter
        program = sys.executable
    module = arguments[1] if arguments[:1] == ["-m"] and len(arguments) > 1 else None
    fault = "which is not there" if shutil.which(program) is None else None
    if fault is None and module is not None and program != sys.executable:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module.partition('.')[0]!r}) is None)"
        asked = subprocess.run([program, "-c", code], capture_output=True, check=False)
        fault = f"which has no {module}" if asked.returncode else None
    if fault:
        raise PlatformError(
            f"the Jupyter kernel {KERNEL} ({spec.resource_dir}) starts {program}, {fault}: remove that folder, or make it again "
            f"with `{sys.executable} -m ipykernel install --user`"
        )
