# rlhf-trl on CUDA. Build: docker build -t rlhf-trl .
#   docker run --rm --gpus all -v "$PWD/runs:/home/rlhf/runs" -v rlhf-hf:/home/rlhf/.cache/huggingface rlhf-trl run hh_gpt2
# The torch wheel of the registry brings the CUDA libraries that it was built with; the base supplies the driver interface.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv git gcc python3-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rlhf-trl
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY rlhf_trl rlhf_trl
COPY recipes recipes
COPY accelerate_configs accelerate_configs
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install -c constraints.txt torch \
    && /opt/venv/bin/pip install -c constraints.txt ".[deepspeed]"
ENV PATH=/opt/venv/bin:$PATH

RUN useradd --uid 10001 --create-home rlhf && mkdir -p /home/rlhf/runs /home/rlhf/.cache/huggingface \
    && chown -R rlhf /home/rlhf
USER rlhf
WORKDIR /home/rlhf
ENTRYPOINT ["rlhf-trl"]
CMD ["--help"]
