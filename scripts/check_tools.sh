#!/bin/sh
# Says which tools are missing before a build finds out half-way, all at once, with the way to get them.
#   scripts/check_tools.sh            for the build and the demo
#   scripts/check_tools.sh --tests    for the tests as well
#   scripts/check_tools.sh --deploy   for the tests that start containers and networks
set -u
for_what=${1-}

missing=
lack() { missing="$missing  $1
"; }

# at_least FOUND WANTED: compares dotted versions by their first two numbers.
at_least() {
  found_major=${1%%.*} rest=${1#*.} found_minor=${rest%%.*}
  wanted_major=${2%%.*} wanted_minor=${2#*.}
  [ "$found_major" -gt "$wanted_major" ] ||
    { [ "$found_major" -eq "$wanted_major" ] && [ "$found_minor" -ge "$wanted_minor" ]; }
}

if cargo=$(cargo --version 2>/dev/null | cut -d' ' -f2) && [ -n "$cargo" ]; then
  at_least "$cargo" 1.90 || lack "cargo 1.90 or newer (found $cargo): rustup update stable"
else
  lack "cargo 1.90 or newer (found none): https://rustup.rs, then open a new shell"
fi

for compiler in "${CC:-cc}" "${CXX:-c++}"; do
  # CC and CXX may carry arguments, as in "ccache g++".
  # shellcheck disable=SC2086
  $compiler --version >/dev/null 2>&1 || lack "a C and C++ compiler (no '$compiler'): apt-get install g++"
done

python3=${PYTHON:-python3}
wanted_python=3.9
[ -n "$for_what" ] && wanted_python=3.11
python=$("$python3" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || python=
if [ -z "$python" ]; then
  lack "python3 $wanted_python or newer (found none): apt-get install python3 python3-pip python3-venv"
else
  at_least "$python" "$wanted_python" || lack "python3 $wanted_python or newer (found $python)"
  "$python3" -c 'import pip' 2>/dev/null || lack "pip for python3: apt-get install python3-pip"
  if [ -n "$for_what" ]; then
    "$python3" -c 'import venv, ensurepip' 2>/dev/null || lack "venv for python3: apt-get install python3-venv"
  fi
fi

# Where Debian puts the server, which is not on the path.
if [ "$for_what" = --tests ]; then
  set -- /usr/lib/postgresql/*/bin/postgres
  [ -x "$1" ] || lack "PostgreSQL's server, for the tests of the run store: apt-get install postgresql"
fi

if [ "$for_what" = --deploy ]; then
  [ "$(id -u)" = 0 ] || lack "root, for network namespaces and containers: sudo make test-deploy"
  for tool in prometheus promtool; do
    command -v "$tool" >/dev/null || lack "$tool, for the tests of the metrics: apt-get install prometheus"
  done
  command -v ip >/dev/null || lack "ip, for the tests of hosts that are cut off: apt-get install iproute2"
  for tool in buildah podman runc debootstrap catatonit iptables /usr/lib/podman/netavark; do
    command -v "$tool" >/dev/null || lack "$tool, for the tests of the images: apt-get install ${tool##*/}"
  done
fi

if [ -n "$missing" ]; then
  printf 'error: this is missing here:\n%s' "$missing" >&2
  exit 1
fi
