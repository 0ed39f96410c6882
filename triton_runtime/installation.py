"""What the embedded server needs from this machine, found and checked before anything is started.

Each thing that is missing is one `Missing` with one line: what, and what to do.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

SERVER_VERSION = "24.10"
"""The NVIDIA release that the wheel carries; docker-compose.yml runs the same one."""
GLIBC = (2, 35)
LARGEST_BODY = 20 << 20
"""Bytes of the largest picture, where GATEWAY_MAX_BODY_BYTES does not say another number: the gateway's default."""
SERVING = Path(__file__).parent.parent / "export" / "serving.toml"
_OTHER_STEPS = 16 << 20
_PIXELS = 256 << 10
"""What a prepared picture takes, and a little."""
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(4 << 20),
}
"""Pictures and tensors come and go all the time. By default each gets fresh pages of the kernel, which has to clear
them; so freed memory is kept for the next one."""

SHARED_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps it


class Missing(RuntimeError):
    """The embedded Triton cannot run here; the message is one line."""


@dataclass(frozen=True)
class Installation:
    """Where the parts of the server lie."""

    server: Path
    stub: Path
    python_backend: Path
    libraries: tuple[Path, ...]
    site_packages: Path

    @classmethod
    def find(cls) -> Installation:
        """Locate the wheel and this Python's shared library.

        Raises:
            Missing: this machine cannot run the wheel, or something is not installed.
        """
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise Missing(f"needs Linux on x86_64, this is {platform.system()} on {platform.machine()}: use compose")
        name, version = platform.libc_ver()
        if name != "glibc" or tuple(map(int, version.split(".")[:2])) < GLIBC:
            wanted = ".".join(map(str, GLIBC))
            raise Missing(f"needs glibc {wanted} or newer, this is {name or 'another libc'} {version}: use compose")
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise Missing("the wheel nvidia-pytriton is not installed: run 'make setup'")
        package = Path(spec.origin).parent
        root = package / "tritonserver"
        stub = root / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
        found = cls(
            server=root / "bin" / "tritonserver",
            stub=stub / "triton_python_backend_stub",
            python_backend=root / "backends" / "python",
            libraries=(
                package.parent / "nvidia_pytriton.libs",
                _libpython_folder(),
                *sorted(package.parent.glob("nvidia/*/lib")),  # CUDA, where requirements/gpu.lock is installed
            ),
            site_packages=package.parent,
        )
        for path in (found.server, found.stub, found.python_backend / "libtriton_python.so", found.libraries[0]):
            if not path.exists():
                raise Missing(f"{path} is missing: reinstall nvidia-pytriton with 'make setup'")
        _check_packages()
        return found

    @property
    def library_path(self) -> str:
        """LD_LIBRARY_PATH for the server and its stubs: our folders first, then what was there (the GPU's driver)."""
        return ":".join([*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])

    def stub_environment(self) -> dict[str, str]:
        """For a process of this Python that runs a model as the server's stubs do."""
        return {**os.environ, "LD_LIBRARY_PATH": self.library_path}

    def lay_out(self, folder: Path) -> dict[str, str]:
        """Fill `folder` with what one server needs; return the environment to run it in.

        `backends/` is the backend directory: the wheel's Python backend, and our ONNX Runtime on top of it.
        `python/` is a virtual environment for the stubs. They start Python isolated, which ignores PYTHONPATH
        and PYTHONDONTWRITEBYTECODE, but not the environment whose `python3` comes first on the PATH.
        """
        backend = folder / "backends" / "python"
        backend.mkdir(parents=True)
        for path in (*self.python_backend.glob("*.*"), self.stub):
            shutil.copy2(path, backend)  # a link would lead out of the directory, which Triton refuses
        shutil.copytree(Path(__file__).parent / "backends", folder / "backends", dirs_exist_ok=True)

        if not os.access(backend / self.stub.name, os.X_OK):
            raise Missing(f"{folder} is on a file system that lets nothing be executed (noexec): move the checkout")

        python = folder / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = python / "lib" / version / "site-packages"
        packages.mkdir(parents=True)
        # __pycache__ in the repository would make poll mode reload the model.
        (packages / "embedded.pth").write_text(f"{self.site_packages}\nimport sys; sys.dont_write_bytecode = True\n")
        (python / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix, 'bin')}\n")
        (python / "bin").mkdir()
        (python / "bin" / "python3").symlink_to(Path(sys.base_prefix, "bin", version))
        return {
            **MALLOC,
            **os.environ,
            "LD_LIBRARY_PATH": self.library_path,
            "PATH": f"{python / 'bin'}:{os.environ.get('PATH', os.defpath)}",
            "OMP_NUM_THREADS": "1",
        }


def _libpython_folder() -> Path:
    library = str(sysconfig.get_config_var("INSTSONAME") or "")
    # The second one is where a Python has it that was moved after it was built.
    for folder in (Path(str(sysconfig.get_config_var("LIBDIR") or "/nowhere")), Path(sys.base_prefix, "lib")):
        if ".so" in library and (folder / library).exists():
            return folder
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if ctypes.util.find_library(version):
        return Path("/usr/lib")  # the dynamic linker knows it
    raise Missing(f"this Python has no shared lib{version}: install libpython (Debian: lib{version}), or use compose")


def _check_packages() -> None:
    for package in ("numpy", "onnxruntime", "pillow"):
        version = _version(package) or (_version("onnxruntime-gpu") if package == "onnxruntime" else "")
        if not version:
            raise Missing(f"{package} is not installed: run 'make setup'")
        if package == "numpy" and int(version.split(".")[0]) >= 2:
            raise Missing(f"numpy {version} breaks the {SERVER_VERSION} Python stub: install numpy<2 ('make setup')")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def port_from_environment(variable: str, default: int) -> int:
    """The port that `variable` sets; raise `Missing` where it is no port number."""
    value = os.environ.get(variable, str(default))
    if not value.isascii() or not value.isdigit() or not 0 < int(value) < 65536:
        raise Missing(f"{variable}={value!r} is not a port: give a number from 1 to 65535")
    return int(value)


def check_port(address: str, port: int, name: str) -> None:
    """Raise `Missing` where `port` cannot be listened on; `name` is the variable that sets it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise Missing(f"cannot listen on {address}:{port} ({error.strerror}): set {name} to another port") from None


@dataclass(frozen=True)
class SharedMemory:
    """How much of it the Python steps may come to need; they grow with the largest pictures, and never shrink.

    Each process of preprocessing holds a whole batch of pictures, and two more (one was too few). Measured with 64
    clients: pictures of 19.9 MiB took 686 MiB (745 here); of 1.6 MiB they failed with 64 MiB (83 here).

    Args:
        processes: of one version of preprocessing.
        pictures: most in a batch.
        largest: bytes of the largest picture.
    """

    processes: int
    pictures: int
    largest: int

    @classmethod
    def from_settings(cls) -> SharedMemory:
        """export/serving.toml, and GATEWAY_MAX_BODY_BYTES.

        Raises:
            Missing: the variable is no number.
        """
        serving = tomllib.loads(SERVING.read_text())
        largest = os.environ.get("GATEWAY_MAX_BODY_BYTES", str(LARGEST_BODY))
        if not largest.isascii() or not largest.isdigit():
            raise Missing(f"GATEWAY_MAX_BODY_BYTES={largest!r} is no number of bytes")
        return cls(serving["preprocess"]["instances"], serving["max_batch_size"], int(largest))

    @property
    def needed(self) -> int:
        """Bytes."""
        return _OTHER_STEPS + self.processes * (self.pictures + 2) * (self.largest + _PIXELS)

    def largest_in(self, free: int) -> int:
        """Bytes of the largest picture for which so many are enough; 0 or less: none is."""
        return (free - _OTHER_STEPS) // (self.processes * (self.pictures + 2)) - _PIXELS


def check_shared_memory(folder: Path = SHARED_MEMORY_FOLDER) -> None:
    """Raise `Missing` where the Python stubs would have too little shared memory to talk through."""
    if not os.access(folder, os.W_OK):
        raise Missing(f"{folder} is not writable: Triton's Python steps talk through shared memory")
    memory = SharedMemory.from_settings()
    _, used, free = shutil.disk_usage(folder)
    if free >= memory.needed:
        return
    wanted = f"{folder} has {free >> 20} MiB left, pictures of {memory.largest / 2**20:.3g} MiB may need"
    smaller = memory.largest_in(free)
    or_else = f", or set GATEWAY_MAX_BODY_BYTES={smaller}" if smaller > 0 else ""
    size = -(-(used + memory.needed) >> 30)
    raise Missing(f"{wanted} {-(-memory.needed >> 20)}: give it more (docker run --shm-size={size}g){or_else}")
