# Workers and trainers. PyPI's torch for Linux runs on NVIDIA GPUs and without.
# docker build --file deploy/compose/worker.Dockerfile --tag draftmq-worker .
FROM python:3.12-slim AS build
WORKDIR /src
ARG TORCH=torch==2.13.0
RUN python -m venv /opt/draftmq && /opt/draftmq/bin/pip install --no-cache-dir "$TORCH"
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY broker broker
COPY worker worker
COPY trainer_client trainer_client
RUN /opt/draftmq/bin/pip install --no-cache-dir --constraint constraints.txt '.[all]'

FROM python:3.12-slim
COPY --from=build /opt/draftmq /opt/draftmq
ENV PATH=/opt/draftmq/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface HOME=/cache
RUN install --directory --owner=10001 --group=10001 /cache /runs
USER 10001:10001
VOLUME ["/cache", "/runs"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["draftmq"]
CMD ["worker"]
