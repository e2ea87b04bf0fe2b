"""How long a user waits: `import twinax`, and a server of the 110M model until ready, cold and with a warm cache.

Cold is without compiled programs. Python's own bytecode is there, as after an installation, wherever it may be written.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import report
from .model import CONFIG_110M, write


def with_bytecode(folder: Path) -> dict[str, str]:
    """An environment in which what a server imports is found as bytecode."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder)
    imports = "import twinax.serving.engine, twinax.models.decoder, twinax.serving.http.running, twinax.parser"
    subprocess.run([sys.executable, "-c", imports], check=True, env=environment)
    return environment


def import_seconds(environment: dict[str, str], runs: int = 5) -> float:
    """Median of whole processes, the interpreter's own start included."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import twinax"], check=True, env=environment)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def server_seconds(model: Path, cache: Path, environment: dict[str, str]) -> tuple[float, float, float]:
    """From the command to the ready line; of these to load the weights (imports included), and to make the programs."""
    command = [sys.executable, "-m", "twinax", "serve", str(model), "--port", "0", "--compile-cache", str(cache)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"ready at http.* loaded in ([\d.]+) s, compiled in ([\d.]+) s", line):
                seconds = time.perf_counter() - start
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=60)
                return seconds, float(found[1]), float(found[2])
    raise RuntimeError(f"The server ended with status {process.returncode} before it was ready.")


def main() -> None:
    options = report.arguments(str(__doc__), peer=False).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = with_bytecode(Path(folder) / "bytecode")
        rows = [report.Row("startup", "import twinax", import_seconds(environment), None, "", "s", 3.0, False)]
        model, cache = write(Path(folder) / "model", CONFIG_110M), Path(folder) / "cache"
        for case, goal in (("cold", 10.0), ("warm", 2.0)):
            ready, loading, making = server_seconds(model, cache, environment)
            rows.append(report.Row("startup", f"server ready, {case}", ready, None, "", "s", goal, False))
            rows.append(report.Row("startup", f"imports and weights, {case}", loading, None, "", "s", None, False))
            rows.append(report.Row("startup", f"programs, {case}", making, None, "", "s", None, False))
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
