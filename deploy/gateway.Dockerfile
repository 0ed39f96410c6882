ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY requirements/gateway.lock /tmp/gateway.lock
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/gateway.lock && rm /tmp/gateway.lock
WORKDIR /app
COPY contract ./contract
COPY gateway ./gateway
USER 65532:65532
EXPOSE 8080
CMD ["python", "-m", "gateway"]
