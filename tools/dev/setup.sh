#!/usr/bin/env bash
# Brings a machine to the point where PURPOSE (demo, test, lint, bench) can run: system packages,
# then a virtual environment in .venv. Quick when there is nothing to do.
#
#   tools/dev/setup.sh PURPOSE
#
# System packages are installed with apt when this runs as root on Debian or a descendant of it.
# Otherwise the missing ones are named in one message. .venv is made again when pyproject.toml, the
# interpreter or the folder has changed.
set -euo pipefail

purpose=${1-}
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$top/.venv

# What pyfuse3 needs to be built and to mount, and a virtual environment to put it in.
required=(python3 python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev fuse3 mount)
# What only the mounted tests call; without one of them its tests are skipped.
for_tests=(acl attr debootstrap e2fsprogs fuse-overlayfs libcap2-bin util-linux xz-utils)
for_bench=(fuse-overlayfs tar unionfs-fuse)

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

[[ $purpose =~ ^(demo|test|lint|bench)$ ]] || die "the purpose is demo, test, lint or bench"

# Print those of the packages named that are not installed.
missing_packages() {
    local package
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            printf '%s ' "$package"
    done
}

# Put the missing ones of the packages named on the machine, or say which they are.
# $1 is `required`, and then it is an error not to have them, or `wanted`.
provide_packages() {
    local urgency=$1; shift
    local missing how
    if ! command -v dpkg-query >/dev/null; then
        [[ $urgency == wanted ]] || { command -v gcc && pkg-config --exists fuse3; } >/dev/null 2>&1 ||
            die "a C compiler, pkg-config and the headers of libfuse 3 and Python are needed" \
                "(on Debian: $*)"
        return
    fi
    read -ra missing <<<"$(missing_packages "$@")"
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ $EUID -eq 0 ]]; then
        printf 'setup: installing %s\n' "${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        quietly apt-get -qq update
        quietly apt-get -qq -y install --no-install-recommends "${missing[@]}"
        return
    fi
    how="apt-get install ${missing[*]}"
    [[ $urgency == wanted ]] || die "packages are missing; as root: $how"
    printf 'setup: some tests will be skipped for want of packages; as root: %s\n' "$how"
}

# Run a command without a terminal; what it says is shown only if it fails.
quietly() {
    local said
    said=$("$@" </dev/null 2>&1) || die "this failed: $*"$'\n'"$said"
}

# Print the interpreter to use: the system's own, whose headers apt provides, before any other.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3 python3.14 python3.13 python3.12 \
        python3.11; do
        candidate=$(command -v "$candidate") || continue
        "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
            { printf '%s\n' "$candidate"; return; }
    done
    die "no python3 of version 3.11 or later, with its venv module, was found"
}

make_venv() {
    local python stamp
    python=$(find_python)
    stamp="$venv $("$python" -VV | tr '\n' ' ') $(sha256sum <"$top/pyproject.toml")"
    [[ -x $venv/bin/python && $(cat "$venv/stamp" 2>/dev/null) == "$stamp" ]] && return
    printf 'setup: making .venv with %s\n' "$python"
    quietly "$python" -m venv --clear "$venv"
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        --editable "$top[dev]"
    printf '%s\n' "$stamp" >"$venv/stamp"
}

# Two of these at once would build the same .venv.
exec {lock}<"$top"
flock "$lock"

provide_packages required "${required[@]}"
if [[ $purpose == test ]]; then provide_packages wanted "${for_tests[@]}"; fi
if [[ $purpose == bench ]]; then provide_packages required "${for_bench[@]}"; fi
make_venv
