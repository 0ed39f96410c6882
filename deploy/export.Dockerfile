ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY requirements/export.lock /tmp/export.lock
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/export.lock && rm /tmp/export.lock
WORKDIR /app
COPY contract ./contract
COPY export ./export
COPY model_repository ./model_repository
RUN mkdir /models && chown 65532:65532 /models
USER 65532:65532
# What the volume has already is never overwritten: published versions are immutable.
CMD ["sh", "-c", "cp --recursive --no-clobber model_repository /models/ && exec python -m export --if-missing --repository /models/model_repository"]
