# Triton with what the Python steps need. The server is the release that the embedded wheel carries.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:24.10-py3
FROM ${TRITON_IMAGE}
COPY requirements/steps.lock /tmp/steps.lock
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/steps.lock && rm /tmp/steps.lock
# Engines that TensorRT builds are kept here, in a volume.
RUN mkdir -p /var/cache/tensorrt && chown triton-server:triton-server /var/cache/tensorrt
# The health check.
COPY triton_runtime/stubs.py /opt/stubs.py
USER triton-server
