#!/bin/bash
# Builds Horovod against the torch that is installed, and installs it into the environment of PYTHON:
#   PYTHON=.venv/bin/python configs/cluster/horovod.sh
# Once per version of torch and Python: two to three minutes on two free cores. The wheel stays in
# ~/.cache/lightning-recipes/horovod, from where the next call installs it. Needs g++ and make; where torch is one for
# CUDA also nvcc and NCCL as developers need it (libnccl-dev, or HOROVOD_NCCL_HOME). On a cluster, build on a node like
# those of the jobs.
set -euo pipefail
version=0.28.1 python=${PYTHON:-python}

stop() { echo "horovod.sh: $1" >&2; exit 2; }
for tool in g++ make tar; do
  command -v "$tool" > /dev/null || stop "$tool is missing, which the build needs; apt-get install build-essential"
done
about='import sys, torch; print(torch.__version__, "cp%d%d" % sys.version_info[:2], torch.version.cuda or "")'
facts=$("$python" -c "$about" 2> /dev/null) || stop "$python cannot import torch; set PYTHON to one that can"
read -r torch tag cuda <<< "$facts"

cache=${XDG_CACHE_HOME:-$HOME/.cache}/lightning-recipes/horovod/torch-$torch
pip() { "$python" -m pip --disable-pip-version-check -qq "$@"; }

if ! compgen -G "$cache/horovod-$version-$tag-*.whl" > /dev/null; then
  echo "Building Horovod $version for torch $torch, some minutes ..."
  mkdir -p "$cache"
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
  # Horovod's build needs older tools than the environment may hold: they are put beside it, for the build only.
  pip install --target "$build/tools" 'setuptools<80' 'cmake<4' wheel packaging
  export PYTHONPATH=$build/tools PATH=$build/tools/bin:$PATH MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
  export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1
  export HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITHOUT_MPI=1
  if [ -n "$cuda" ]; then export HOROVOD_GPU_OPERATIONS=NCCL; fi

  # Its CMake files ask for C++14, torch's headers for C++17.
  pip download --no-deps --no-build-isolation --no-binary horovod --dest "$build" "horovod==$version"
  tar -xf "$build/horovod-$version.tar.gz" -C "$build"
  sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' "$build/horovod-$version"/{.,horovod/torch}/CMakeLists.txt
  pip wheel --no-deps --no-build-isolation --wheel-dir "$build" "$build/horovod-$version" > "$cache/build.log" 2>&1 ||
    stop "the build failed; $cache/build.log says why"
  mv "$build"/horovod-$version-*.whl "$cache"
  rm "$cache/build.log"
fi
pip uninstall --yes horovod  # of the same version, built for another torch
pip install "$cache"/horovod-$version-$tag-*.whl
"$python" -c 'import horovod.torch; print("Horovod", horovod.__version__, "is installed")'
