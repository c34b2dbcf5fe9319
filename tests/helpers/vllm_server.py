"""A server of the vLLM that is installed beside this Python, for a small model on a CPU."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from helpers.chain import wait_until

CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class VllmServer:
    """`vllm serve` of a model's directory as `name`, with its log in `log`; `context` is in tokens."""

    def __init__(self, model: Path, name: str, port: int, log: Path, context: int = 200):
        self.model, self.name, self.port, self.log, self.context = model, name, port, log, context
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        module = "vllm.entrypoints.openai.api_server"  # `vllm serve` asks for the metadata of a package named vllm
        command = [sys.executable, "-m", module, "--model", self.model, "--served-model-name", self.name]
        command += ["--port", self.port, "--dtype", "float32", "--max-model-len", self.context, "--enforce-eager"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=os.environ | CPU, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self._answers, self.process, seconds=300)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(60)
            self.process = None
