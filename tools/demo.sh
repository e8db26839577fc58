#!/usr/bin/env bash
# Two directories stacked as in the aufs manual, written to through the mount, and what each of
# them holds afterwards. Everything happens in a new folder below /var/tmp, removed at the end.
#
#   tools/demo.sh MICA_FUSE
set -euo pipefail

mica_fuse=$(realpath -s -- "${1:?the mica-fuse to show}")

die() { printf 'demo: %s\n' "$*" >&2; exit 1; }

mica-fuse() { "$mica_fuse" "$@"; }

[[ -c /dev/fuse ]] || die "/dev/fuse is missing (modprobe fuse; in a container: --device /dev/fuse)"
if [[ $EUID -ne 0 ]]; then
    [[ -r /dev/fuse && -w /dev/fuse ]] || die "/dev/fuse is not open to you; run this as root"
    unshare -Urm true 2>/dev/null || die "no user namespaces for you here; run this as root"
    exec unshare -Urm "$0" "$@"
fi

base=$(mktemp -d /var/tmp/mica-demo.XXXXXX)
union=$base/union

# The pids of the processes that have the demo's folder on their command line: the server.
servers() {
    local cmdline
    for cmdline in /proc/[0-9]*/cmdline; do
        [[ $cmdline == "/proc/$$/cmdline" ]] ||
            ! grep -qsF "$base/" "$cmdline" || { cmdline=${cmdline%/cmdline}; echo "${cmdline#/proc/}"; }
    done
}

unmount() {
    umount "$union"
    # The mount is gone at once; its server needs a moment to close the two directories.
    for _ in {1..100}; do
        [[ -n $(servers) ]] || return 0
        sleep 0.1
    done
    die "the server is still there ten seconds after the unmount: $(servers)"
}

clean_up() {
    local status=$? pid
    if mountpoint -q "$union"; then umount -l "$union"; fi
    for pid in $(servers); do kill -9 "$pid" || true; done
    rm -rf --one-file-system "$base"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

title() {
    if [[ -t 1 ]]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi
}

# Run a command and show it as a user would have typed it.
run() {
    printf '  $ %s\n' "$1"
    (cd "$base" && eval "$1") | sed 's/^/    /'
}

# Print the name under which a renamed directory lies in the sheets below, if it was renamed.
former_name() {
    python3 -c '
import os, sys
for prefix in "trusted", "user":
    try:
        print(os.path.basename(os.fsdecode(os.getxattr(sys.argv[1], f"{prefix}.overlay.redirect"))))
    except OSError:
        continue
' "$1"
}

# List what a directory holds, with the contents of files and the meaning of markers.
show() {
    local path name former
    printf '  %s\n' "$1"
    (cd "$base/$1" && find . -mindepth 1 | LC_ALL=C sort) | while read -r path; do
        path=${path#./}
        name=$base/$1/$path
        if [[ -d $name ]]; then
            former=$(former_name "$name")
            printf '    %-14s %s\n' "$path/" "${former:+(renamed: below it is called $former)}"
        elif [[ -c $name && $(stat -c %t:%T "$name") == 0:0 ]]; then
            printf '    %-14s (a whiteout: hides this name in the sheets below)\n' "$path"
        else
            printf '    %-14s %s\n' "$path" "$(<"$name")"
        fi
    done | sed 's/ *$//'
}

mkdir "$base"/{a,b,b/docs,union}
echo 'tea with milk' >"$base/b/tea"
echo 'black coffee' >"$base/b/coffee"
echo 'read me' >"$base/b/docs/readme"
echo 'still water' >"$base/a/water"

title 'Two directories: a is the sheet on top, b lies below'
show a
show b

title 'Stacked, a writable and b read-only'
printf '  $ mica-fuse -o dirs="%s/a=rw:%s/b=ro" %s\n' "$base" "$base" "$union"
mica-fuse -o "dirs=$base/a=rw:$base/b=ro" "$union"
show union

title 'Written to through the mount'
run 'echo "tea with lemon" > union/tea'
run 'rm union/coffee'
run 'mv union/docs union/manual'
run 'echo "orange juice" > union/juice'
show union

title 'Unmounted: b is as it was, and a holds what changed'
unmount
show a
show b
[[ $(<"$base/b/tea") == 'tea with milk' && -f $base/b/coffee && -f $base/b/docs/readme ]] ||
    die "the lower directory was changed"

title 'Nothing in the upper contradicts itself'
run 'mica-fuse --check a && echo no faults'
