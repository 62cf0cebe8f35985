# The broker alone: the base install. It never imports torch, so the image has none: about 60 MB over Python's.
# docker build --file deploy/compose/broker.Dockerfile --tag draftmq-broker .
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY broker broker
COPY worker/__init__.py worker/
COPY trainer_client/__init__.py trainer_client/
RUN python -m venv /opt/draftmq \
    && /opt/draftmq/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.12-slim
COPY --from=build /opt/draftmq /opt/draftmq
ENV PATH=/opt/draftmq/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 5555 5556 9555
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s \
    CMD ["draftmq", "status", "--json"]
ENTRYPOINT ["draftmq"]
CMD ["broker"]
