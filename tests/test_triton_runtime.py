"""The embedded server: what it needs is checked, what it serves is right, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from export import config
from tests.conftest import ROOT, free_endpoint, http, process_of, wait_for
from tests.offline import Offline
from tests.test_preprocessing import png_header
from triton_runtime import installation, workplace
from triton_runtime.installation import SHARED_MEMORY_FOLDER, Installation, Missing, SharedMemory
from triton_runtime.server import Endpoint, TritonFailed, TritonServer
from triton_runtime.stubs import servers_since
from triton_runtime.workplace import PLACE, Workplace, sweep


def infer(endpoint: Endpoint, model: str, pictures: Sequence[bytes]) -> dict[str, np.ndarray]:
    """All outputs of a model that takes pictures, by name."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="IMAGE", datatype="BYTES", shape=[len(pictures), 1])
    request.raw_input_contents.append(b"".join(len(p).to_bytes(4, "little") + p for p in pictures))
    with grpc.insecure_channel(endpoint.grpc_url, options=[("grpc.max_receive_message_length", -1)]) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
    outputs = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            texts = []
            while raw:
                length = int.from_bytes(raw[:4], "little")
                texts.append(raw[4 : 4 + length])
                raw = raw[4 + length :]
            outputs[output.name] = np.array(texts, object).reshape(output.shape)
        else:
            kind = {"FP32": "<f4", "INT64": "<i8", "UINT8": "u1"}[output.datatype]
            outputs[output.name] = np.frombuffer(raw, kind).reshape(output.shape)
    return outputs


# ---- what is served ----


def test_the_served_tensor_is_bit_for_bit_the_trained_one(
    triton: Endpoint, offline: Offline, photographs: list[Path]
) -> None:
    for start in range(0, len(photographs), 8):
        pictures = [path.read_bytes() for path in photographs[start : start + 8]]
        served = infer(triton, "defect_preprocess", pictures)
        assert (served["PIXELS"] == np.stack([offline.pixels(data) for data in pictures])).all()
        assert not served["ERROR"].any()


def test_one_bad_picture_costs_the_others_of_its_call_nothing(
    triton: Endpoint, release: str, offline: Offline, jpeg: bytes
) -> None:
    answers = infer(triton, release, [jpeg, b"junk", jpeg, png_header(10_000, 10_000), b""])
    codes = [error.partition(b": ")[0].decode() for error in answers["ERROR"][:, 0]]
    assert codes == ["", "image_unsupported", "", "image_too_large", "image_empty"]
    label, scores = offline.answer(jpeg)
    for row in (0, 2):
        assert answers["LABEL"][row, 0].decode() == label
        assert answers["CONFIDENCE"][row, 0] == pytest.approx(scores[label], abs=1e-5)
    for row in (1, 3, 4):
        assert answers["LABEL"][row, 0] == b""
        assert np.isnan(answers["CONFIDENCE"][row, 0])
        assert np.isnan(answers["SCORES"][row]).all()


def test_the_digest_proves_which_classifier_ran(triton: Endpoint, release: str, offline: Offline, jpeg: bytes) -> None:
    answers = infer(triton, release, [jpeg] * 3)
    assert set(answers["DIGEST"][:, 0]) == {offline.manifest.steps["classifier"].digest.encode()}


def test_times_of_the_steps_are_in_order(triton: Endpoint, release: str, jpeg: bytes) -> None:
    times = infer(triton, release, [jpeg] * 2)["TIMES"]
    assert times.shape == (2, 4)
    assert (np.diff(times) > 0).all()


def test_the_configuration_is_what_the_design_asks_for(pristine: Path, release: str) -> None:
    def read(model: str) -> config.pb.ModelConfig:
        return config.parse((pristine / model / "config.pbtxt").read_text())

    group = config.pb.ModelInstanceGroup
    for step, kind in (
        ("preprocess", group.KIND_CPU),
        ("classifier", group.KIND_AUTO),
        ("postprocess", group.KIND_CPU),
    ):
        model = read(f"defect_{step}")
        assert model.HasField("dynamic_batching")
        assert not model.dynamic_batching.HasField("default_queue_policy"), "one stalls lone requests: serving.toml"
        assert [g.kind for g in model.instance_group] == [kind]
        assert list(model.version_policy.specific.versions) == [1]
    assert {w.batch_size for w in read("defect_classifier").model_warmup} == {
        1,
        read("defect_classifier").max_batch_size,
    }
    pinned = {step.model_name: step.model_version for step in read(release).ensemble_scheduling.step}
    assert pinned == {"defect_preprocess": 1, "defect_classifier": 1, "defect_postprocess": 1}


def test_tensorrt_is_an_option() -> None:
    serving = config.Serving.model_validate({"classifier": {"accelerator": "tensorrt", "precision": "fp16"}})
    rendered = config.classifier("defect", [1], 224, 2, serving)
    (accelerator,) = rendered.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["precision_mode"] == "FP16"
    assert accelerator.parameters["trt_engine_cache_enable"] == "true"
    assert accelerator.parameters["trt_engine_cache_path"] == "/var/cache/tensorrt/defect"
    assert config.parse(config.render(rendered).decode()) == rendered


@pytest.mark.parametrize("device", ["auto", "gpu", "cpu"])
def test_where_the_model_runs_is_an_option(device: str) -> None:
    serving = config.Serving.model_validate({"classifier": {"device": device, "instances": 2}})
    (group,) = config.classifier("defect", [1], 224, 2, serving).instance_group
    assert group.kind == config.pb.ModelInstanceGroup.Kind.Value(f"KIND_{device.upper()}")
    assert group.count == 2


def test_a_release_that_demands_a_gpu_does_not_load_without_one_and_says_so(repository: Path) -> None:
    """Triton's own message; the other models of the repository are not the reason."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    file = repository / "defect_classifier" / "config.pbtxt"
    demanded = config.parse(file.read_text())
    demanded.instance_group[0].kind = config.pb.ModelInstanceGroup.KIND_GPU
    file.write_bytes(config.render(demanded))
    with TritonServer(repository, free_endpoint()) as server, pytest.raises(TritonFailed, match=r"(?i)gpu"):
        server.wait_until_ready()


def test_a_bound_on_triton_s_queues_is_an_option() -> None:
    rendered = config.postprocess("defect", [1], 2, config.Serving.model_validate({"max_queue_size": 9}))
    assert rendered.dynamic_batching.default_queue_policy.max_queue_size == 9


# ---- what it refuses ----


REFUSED = {
    "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=8),
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="defect-v1"),
    "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name="defect-v1"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_could_harm_the_server_is_refused_over_grpc(triton: Endpoint, call: str) -> None:
    with grpc.insecure_channel(triton.grpc_url) as channel, pytest.raises(grpc.RpcError) as caught:
        getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), call)(REFUSED[call], timeout=10)
    reason = "not allowed if polling is enabled" if call.startswith("RepositoryModel") else "protocol is restricted"
    assert reason in caught.value.details()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/systemsharedmemory/region/x/register", {"key": "/x", "offset": 0, "byte_size": 8}),
        ("/v2/systemsharedmemory/status", None),
        ("/v2/cudasharedmemory/status", None),
        ("/v2/trace/setting", {"trace_file": "/tmp/x", "trace_level": ["TIMESTAMPS"]}),
        ("/v2/models/defect-v1/trace/setting", {"trace_level": ["TIMESTAMPS"]}),
        ("/v2/logging", {"log_file": "/tmp/x", "log_verbose_level": 9}),
        ("/v2/repository/models/defect-v1/load", {}),
        ("/v2/repository/models/defect-v1/unload", {}),
    ],
)
def test_what_could_harm_the_server_is_refused_over_http(triton: Endpoint, path: str, body: dict | None) -> None:
    response = http.get(triton.url(path)) if body is None else http.post(triton.url(path), json=body)
    if "/repository/" in path:
        assert "not allowed if polling is enabled" in response.text
    else:
        assert (response.status_code, "API is restricted" in response.text) == (403, True)


# ---- what it needs ----


def test_each_thing_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason() -> str:
        with pytest.raises(Missing) as caught:
            Installation.find()
        monkeypatch.undo()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "aarch64" in reason()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    assert "glibc 2.35 or newer" in reason()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert "another libc" in reason()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "make setup" in reason()
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: None)
    monkeypatch.setattr("ctypes.util.find_library", lambda _: None)
    assert "shared libpython3.11" in reason()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.4.0")
    assert "numpy<2" in reason()
    with pytest.raises(Missing, match="is not writable"):
        installation.check_shared_memory(tmp_path / "nowhere")


def test_too_little_shared_memory_is_one_line_that_says_what_is_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GATEWAY_MAX_BODY_BYTES", raising=False)
    used, free = 0, 64 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (used + free, used, free))
    with pytest.raises(Missing, match=r"has 64 MiB left, pictures of 20 MiB may need 745: .*--shm-size=1g") as caught:
        installation.check_shared_memory(tmp_path)
    assert "\n" not in str(caught.value)
    enough = re.search(r"GATEWAY_MAX_BODY_BYTES=(\d+)$", str(caught.value))
    assert enough
    monkeypatch.setenv("GATEWAY_MAX_BODY_BYTES", enough[1])
    installation.check_shared_memory(tmp_path)
    monkeypatch.setenv("GATEWAY_MAX_BODY_BYTES", str(int(enough[1]) + 100))
    with pytest.raises(Missing, match="may need"):
        installation.check_shared_memory(tmp_path)
    free = 10 << 20
    with pytest.raises(Missing, match=r"--shm-size=1g\)$"):
        installation.check_shared_memory(tmp_path)
    monkeypatch.delenv("GATEWAY_MAX_BODY_BYTES")
    used = 500 << 20
    with pytest.raises(Missing, match="--shm-size=2g"):  # what others use stays used
        installation.check_shared_memory(tmp_path)
    monkeypatch.setenv("GATEWAY_MAX_BODY_BYTES", "20 MB")
    with pytest.raises(Missing, match="GATEWAY_MAX_BODY_BYTES='20 MB' is no number"):
        installation.check_shared_memory(tmp_path)


_CROWD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.test_triton_runtime import infer
from tests.fuzzing import handmade
from triton_runtime.server import TritonServer
from harness.ports import free_endpoint
from PIL import Image

size, clients = int(sys.argv[2]), int(sys.argv[3])
side = int((size / 3) ** 0.5) // 4 * 4 - 4
picture = handmade.os2(Image.new("RGB", (side, side)))
picture += bytes(size - len(picture))
with TritonServer(Path(sys.argv[1]), free_endpoint()) as server:
    server.wait_until_ready()
    with ThreadPoolExecutor(clients) as pool:
        for answer in pool.map(lambda _: infer(server.endpoint, "defect-v1", [picture]), range(3 * clients)):
            assert not answer["ERROR"].any(), answer["ERROR"]
print("answered")
"""


@pytest.mark.alone
def test_the_shared_memory_that_the_start_asks_for_is_enough_for_a_crowd(pristine: Path) -> None:
    """Of clients that send nothing but the largest pictures, past the gateway, which would let fewer of them in."""
    largest = 4 << 20
    memory = dataclasses.replace(SharedMemory.from_settings(), largest=largest)
    mount = f"mount -t tmpfs -o size={memory.needed} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a /dev/shm of one's own needs root")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", _CROWD]
    done = subprocess.run(
        [*command, str(pristine), str(largest), "64"],
        cwd=ROOT,
        env={**os.environ, "GATEWAY_MAX_BODY_BYTES": str(largest)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("answered\n"), done.stderr[-2000:]


def test_a_port_in_use_is_named_with_the_variable_that_sets_it(pristine: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = Endpoint(http=taken.getsockname()[1], grpc=1, metrics=1)
        with pytest.raises(Missing, match="TRITON_HTTP_PORT"):
            TritonServer(pristine, endpoint).__enter__()


def test_a_repository_without_a_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="make export"):
        TritonServer(tmp_path, free_endpoint()).__enter__()


@pytest.mark.parametrize("value", ["", "http", "0", "70000", "-1"])
def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRITON_GRPC_PORT", value)
    with pytest.raises(Missing, match="TRITON_GRPC_PORT"):
        Endpoint.from_environment()


def test_a_model_that_cannot_load_is_named_with_its_reason(repository: Path) -> None:
    (repository / "defect_classifier" / "1" / "model.onnx").write_bytes(b"no model")
    with TritonServer(repository, free_endpoint()) as server, pytest.raises(TritonFailed) as caught:
        server.wait_until_ready(60)
    assert "defect_classifier" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [b"garbage", b"\xff\xfe\0", b""])
def test_what_is_broken_of_one_pipeline_keeps_no_other_from_its_start(
    pristine: Path, tmp_path: Path, release: str, config: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    repository = Path(shutil.copytree(pristine, tmp_path / "model_repository"))
    (repository / "fruit-v1").mkdir()
    (repository / "fruit-v1/config.pbtxt").write_bytes(config)
    with TritonServer(repository, free_endpoint()) as server:
        assert server.wait_until_ready() == [release]
    assert "triton: goes on without fruit-v1 (" in capfd.readouterr().err


class Crashing(TritonServer):
    """One that left_to_crash so many times before it runs, as Triton does too seldom to be waited for."""

    left_to_crash = 0

    def command(self, server: Path, backends: Path) -> list[str]:
        self.left_to_crash -= 1
        return ["sh", "-c", "kill -ABRT $$"] if self.left_to_crash >= 0 else super().command(server, backends)


def test_a_crash_at_the_start_is_tried_again_but_once(
    pristine: Path, release: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Crashing, "left_to_crash", 1)
    with Crashing(pristine, free_endpoint()) as server:
        assert server.wait_until_ready() == [release]
    assert "crashed while starting" in capsys.readouterr().err
    monkeypatch.setattr(Crashing, "left_to_crash", 2)
    with Crashing(pristine, free_endpoint()) as server, pytest.raises(TritonFailed, match="status -6"):
        server.wait_until_ready()


# ---- how it ends ----


def left_by(process: subprocess.Popen) -> set[str]:
    """Shared memory and folders of the servers that a process started."""
    return {str(path) for place in (SHARED_MEMORY_FOLDER, PLACE) for path in place.glob(f"triton_{process.pid}_*")}


def listening_on(port: int) -> list[str]:
    """Addresses, as the kernel writes them, on which something listens on a port."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            address, _, number = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(number, 16) == port:
                found.append(address)
    return found


def processes(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@contextlib.contextmanager
def embedded(repository: Path, endpoint: Endpoint) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`python -m triton_runtime` when it is ready, and the process id of its server."""
    process = subprocess.Popen(
        [sys.executable, "-m", "triton_runtime", "--repository", str(repository)],
        cwd=ROOT,
        env={**os.environ, **endpoint.to_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: defect-v1 at 127.0.0.1:")
        (server,) = (int(p.name) for p in Path("/proc").glob("[0-9]*") if parent(p) == process.pid)
        yield process, server
    finally:
        process.terminate()
        process.communicate()


def parent(folder: Path) -> int:
    try:
        return int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_and_nothing_is_left(pristine: Path, number: int) -> None:
    endpoint = free_endpoint()
    with embedded(pristine, endpoint) as (process, server):
        assert len(processes(server)) > 3, "the server and its stubs"
        for port in (endpoint.http, endpoint.grpc, endpoint.metrics):
            assert set(listening_on(port)) <= {"0100007F", "0000000000000000FFFF00000100007F"}, "on loopback alone"
            assert len(listening_on(port)) == 1
        assert left_by(process)
        process.send_signal(number)
        assert process.wait(60) == 0
    assert processes(server) == []
    assert left_by(process) == set()
    assert not list(pristine.rglob("__pycache__"))


def test_a_server_that_dies_is_reported_and_not_restarted(pristine: Path) -> None:
    with embedded(pristine, free_endpoint()) as (process, server):
        os.kill(server, signal.SIGKILL)
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert "ended by itself with status -9" in process.stderr.read()
    assert processes(server) == []
    assert left_by(process) == set()


@pytest.mark.alone  # any server that starts cleans up
def test_a_server_whose_parent_is_killed_ends_too_and_the_next_one_cleans_up(pristine: Path) -> None:
    environments = set(Path("/tmp").glob("python_env_*"))
    with embedded(pristine, free_endpoint()) as (killed, server):
        killed.kill()
        killed.wait()
        wait_for(lambda: processes(server) == [], 60)
    assert left_by(killed), "nobody was there to remove it"
    with embedded(pristine, free_endpoint()) as (process, server):
        assert left_by(killed) == set()
        sweep()
        assert any(path.startswith(str(PLACE)) for path in left_by(process)), "what is in use stays"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert left_by(process) == set()
    if not servers_since():  # one that runs may have made what is new
        assert set(Path("/tmp").glob("python_env_*")) <= environments


def test_nothing_of_a_server_lies_among_the_temporary_files(triton: Endpoint) -> None:
    """Cleaners remove there what is ten days old, and where nothing may be executed no step could be started."""
    server = process_of(triton)
    used = {str(Path(each.path).parent) for each in server.memory_maps() if "triton" in each.path}
    assert not [path for path in used if path.startswith(tempfile.gettempdir())]
    assert str(PLACE) in str(server.cwd())


def test_a_checkout_that_is_not_ours_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "file").write_text("")
    place = Workplace(tmp_path / "file" / "cache")
    assert place.folder.parent == tmp_path
    place.remove()
    assert not place.folder.exists()


def test_a_server_that_ends_leaves_the_environment_of_another_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workplace, "_ENVIRONMENTS", tmp_path)
    (tmp_path / "tritonserver").symlink_to(str(shutil.which("sleep")))
    first, second = Workplace(tmp_path / "cache"), Workplace(tmp_path / "cache")
    environment = tmp_path / "python_env_other"
    with subprocess.Popen(["sleep", "600"], executable=tmp_path / "tritonserver") as other:
        environment.mkdir()
        first.remove()
        assert environment.exists()
        other.kill()
    monkeypatch.setattr(workplace, "servers_since", list)  # other tests' servers may run
    second.remove()
    assert not environment.exists()


def test_a_server_that_starts_removes_no_folder_that_another_one_just_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of the folder and its lock."""
    lock = fcntl.flock

    def lock_late(file: int, how: int) -> None:
        if how == fcntl.LOCK_EX:
            monkeypatch.setattr(fcntl, "flock", lock)
            sweep(tmp_path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    place = Workplace(tmp_path)
    sweep(tmp_path)
    assert place.folder.exists()
    place.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_was_stopped_while_it_was_restarted_is_cleaned_up_once(tmp_path: Path) -> None:
    """Both do it, and a descriptor that is closed twice may be somebody else's by then."""
    place = Workplace(tmp_path)
    place.remove()
    with (tmp_path / "another").open("w") as another:  # which may get the same number
        place.remove()
        another.write("still open")
        another.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["another"]
