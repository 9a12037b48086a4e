#!/usr/bin/env bash
# What an image needs, for the Dockerfile and moa.def alike: a compiler for the C++ ops that DeepSpeed
# builds at first use, and the package with all it depends on.
set -euo pipefail
apt-get update
apt-get install -y --no-install-recommends g++ git
rm -rf /var/lib/apt/lists/*
pip install --no-cache-dir /opt/moa
