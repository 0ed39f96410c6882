"""`python -m triton_runtime.stack`: export if needed, then Triton, gateway and watcher, and one prediction as proof.

What `make serve` runs. Gateway and watcher are processes like any other here; nothing of them is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from triton_runtime.child import ROOT, Child
from triton_runtime.installation import Missing, check_port, port_from_environment
from triton_runtime.server import Endpoint, TritonFailed, TritonServer
from triton_runtime.signals import Stopped, unwind_on_signals
from triton_runtime.supervision import Part, Supervisor
from triton_runtime.terminal import Terminal

SAMPLE = ROOT / "examples" / "parcel-damaged.jpg"


class Gateway(Child):
    """The gateway in front of `triton`."""

    def __init__(self, triton: Endpoint, address: str, port: int, stdout: int | None = None) -> None:
        environment = {
            "GATEWAY_TRITON_URLS": triton.grpc_url,
            "GATEWAY_HOST": address,
            "GATEWAY_PORT": str(port),
        }
        self._headers = {"Content-Type": "image/jpeg"}
        keys = os.environ.get("GATEWAY_API_KEYS", "")
        if keys or os.environ.get("GATEWAY_API_KEYS_FILE"):
            self._headers["X-API-Key"] = key = secrets.token_urlsafe(32)
            environment["GATEWAY_API_KEYS"] = f"{keys},serve:{hashlib.sha256(key.encode()).hexdigest()}"
        grace = 30.0
        with contextlib.suppress(ValueError):  # the gateway says what is wrong with it
            grace = float(os.environ.get("GATEWAY_GRACE_S", grace)) + float(os.environ.get("GATEWAY_DRAIN_S", 0))
        super().__init__("gateway", environment=environment, stdout=stdout, grace_seconds=grace + 5)
        scheme = "https" if os.environ.get("GATEWAY_TLS_CERTIFICATE") else "http"
        self.url = f"{scheme}://{address}:{port}"

    def example(self, picture: Path) -> str:
        """A command that sends a picture. It has no key in it: that of this process goes when it ends."""
        parts = ["curl"]
        if self.url.startswith("https:"):
            parts.append("--insecure")  # the certificate need not name this address
        if "X-API-Key" in self._headers:
            parts.append('-H "X-API-Key: $KEY"')
        parts.append(f"-H 'Content-Type: image/jpeg' --data-binary @{picture} {self.url}/v1/predict")
        return " ".join(parts)

    def predict(self, picture: Path, timeout: float) -> dict:
        """Send one picture until it is answered.

        Raises:
            TritonFailed: the gateway ended, or gave no answer in time.
        """
        deadline, last = time.monotonic() + timeout, "no answer"
        # Our own child: its certificate is for others, and need not name this address.
        context = ssl._create_unverified_context()  # noqa: S323
        while time.monotonic() < deadline and self.process.poll() is None:
            request = urllib.request.Request(f"{self.url}/v1/predict", picture.read_bytes(), self._headers)
            try:
                with urllib.request.urlopen(request, timeout=10, context=context) as response:
                    return dict(json.load(response))
            except urllib.error.HTTPError as error:
                last = error.read().decode(errors="replace")
            except OSError as error:
                last = str(error)
            time.sleep(0.2)
        raise TritonFailed(f"the gateway does not answer: {last}")


def main(arguments: list[str] | None = None) -> int:
    """Run until a signal comes (0), or a part cannot be started or is abandoned (its status, or 1)."""
    parse = argparse.ArgumentParser(prog="python -m triton_runtime.stack", description=__doc__)
    parse.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="default: model_repository")
    parse.add_argument("--verbose", action="store_true", help="Triton's whole log, not only warnings")
    options = parse.parse_args(arguments)
    unwind_on_signals()
    try:
        return _serve(options)
    except Stopped:
        print("stopped", file=sys.stderr)
        return 0
    except (Missing, TritonFailed) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1


def _serve(options: argparse.Namespace) -> int:
    if "GATEWAY_TRITON_URLS" in os.environ:
        raise Missing(
            "GATEWAY_TRITON_URLS names Tritons that run elsewhere, and this starts one of its own: unset it, or start "
            "a gateway alone with 'python -m gateway'"
        )
    address, port = os.environ.get("GATEWAY_HOST", "127.0.0.1"), port_from_environment("GATEWAY_PORT", 8080)
    check_port(address, port, "GATEWAY_PORT")
    repository = ["--repository", str(options.repository.resolve())]
    exporting = [sys.executable, "-m", "export", "--if-missing", *repository]
    if subprocess.run(exporting, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        return 1
    endpoint = Endpoint.from_environment()
    with _terminal() as terminal, contextlib.ExitStack() as parts:
        with terminal.stage("starting Triton"):
            triton = TritonServer(options.repository, endpoint, verbose=options.verbose, log=terminal.pipe())
            parts.enter_context(triton).wait_until_ready()
        with terminal.stage("starting the gateway, which tries each release"):
            gateway = parts.enter_context(Gateway(endpoint, address, port, stdout=terminal.pipe()))
            watcher = parts.enter_context(Child("export", "watch", *repository, stdout=terminal.pipe()))
            answer = gateway.predict(SAMPLE, timeout=30)
        print(f"{answer['model_version']}: {SAMPLE.name} is {answer['label']} ({answer['confidence']:.2f})")
        print(f"ready: {gateway.url}")
        print(f"docs: {gateway.url}/docs")
        print(f"try: {gateway.example(SAMPLE.relative_to(ROOT))}", flush=True)
        if terminal.path:
            print(f"logs: {terminal.path.relative_to(ROOT)}; Ctrl-C stops everything", flush=True)
        running: dict[str, Part] = {"triton": triton, "gateway": gateway, "watcher": watcher}
        return Supervisor(running, spare={"watcher"}).run()  # what is dropped may end it; what answers goes on


def _terminal() -> Terminal:
    """Where logs go: on a terminal, or with `text`, to a file, and news here as well; else all to where we write."""
    shape = os.environ.get("GATEWAY_LOG_FORMAT", "auto")
    is_text = shape == "text" or (shape != "json" and sys.stderr.isatty())
    try:
        return Terminal(ROOT / "build" / "serve.log" if is_text else None)
    except OSError as error:
        raise Missing(
            f"{error.filename} cannot be written ({error.strerror}): GATEWAY_LOG_FORMAT=json needs no file"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
