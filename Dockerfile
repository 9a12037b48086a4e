# docker build -t moa-trainer .
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" moa-trainer moa-train --output_dir outputs/demo
FROM python:3.11-slim-bookworm
COPY pyproject.toml README.md LICENSE slurm/container.sh /opt/moa/
COPY moa /opt/moa/moa
COPY shards /opt/moa/shards
COPY ds_configs /opt/moa/ds_configs
COPY trainer /opt/moa/trainer
RUN bash /opt/moa/container.sh
ENV PYTHONUNBUFFERED=1
WORKDIR /work
CMD ["moa-train", "--help"]
