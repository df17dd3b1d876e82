# Two images from one file.
#   docker build --target cpu  -t raymoe:0.1.0-cpu  .
#   docker build --target cuda -t raymoe:0.1.0-cuda .
# For a build that can be repeated to the byte, give the base by digest:
#   --build-arg PYTHON_IMAGE=python:3.11.13-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/raymoe
ENV PATH=/opt/raymoe/bin:${PATH}
WORKDIR /src
COPY constraints.txt ./

FROM build AS build-cpu
# The CPU build of torch: the one on PyPI brings gigabytes of CUDA libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --constraint constraints.txt torch
# The same version as rayVersion in k8s/base/rayservice.yaml: all pods of a Ray cluster must agree.
ARG RAY_VERSION=2.60.0
COPY pyproject.toml README.md LICENSE serve_app.py ./
COPY placement placement
COPY raymoe raymoe
COPY actors actors
RUN pip install --no-cache-dir --constraint constraints.txt "ray[serve]==${RAY_VERSION}" .

FROM build AS build-cuda
RUN pip install --no-cache-dir --constraint constraints.txt torch
ARG RAY_VERSION=2.60.0
COPY pyproject.toml README.md LICENSE serve_app.py ./
COPY placement placement
COPY raymoe raymoe
COPY actors actors
RUN pip install --no-cache-dir --constraint constraints.txt "ray[serve]==${RAY_VERSION}" .

FROM ${PYTHON_IMAGE} AS run
# The compiler: raymoe/native is compiled where it runs, for the processor it runs on. Without one
# numpy and torch do the same, slower. Not pinned: Debian's mirrors keep only the last versions.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 1000 raymoe && \
    useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp raymoe
# HOME: the root file system may be read-only, /tmp is the place to write.
ENV PATH=/opt/raymoe/bin:${PATH} HOME=/tmp PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
WORKDIR /tmp
USER 1000:1000
EXPOSE 8000
ENTRYPOINT ["raymoe"]
CMD ["--help"]

FROM run AS cuda
# The driver comes from the node (NVIDIA container toolkit). NVIDIA_VISIBLE_DEVICES is not set here:
# an image that asks for all GPUs gets them even in a pod that was given none.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/raymoe /opt/raymoe

FROM run AS cpu
COPY --from=build-cpu /opt/raymoe /opt/raymoe
COPY models/demo /weights/demo
