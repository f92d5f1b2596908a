# Image for JupyterLab and for the machines of a Ray cluster: docker compose up lab, see compose.yaml.
# The package is installed for all users and is not writable; the project folder is mounted at /project.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends git libgomp1 make procps \
    && rm -rf /var/lib/apt/lists/*

# An index with builds of torch for CPUs only saves 3 GB: --build-arg PIP_EXTRA_INDEX_URL=ADDRESS
ARG PIP_EXTRA_INDEX_URL=
COPY . /tmp/source
RUN pip install --no-cache-dir -c /tmp/source/constraints.txt "/tmp/source[ray]" "psycopg[binary]" \
    && rm -rf /tmp/source

# Files in /project get this owner: --build-arg UID=$(id -u)
ARG UID=1000
RUN useradd --create-home --uid "$UID" modelfactory && install -d -o modelfactory /project
USER modelfactory
WORKDIR /project

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--ServerApp.root_dir=/project"]
