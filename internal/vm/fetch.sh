#!/usr/bin/env bash
# Gets what a test guest is made of: QEMU, installed, and Debian's newest kernel package of the 6.12
# series, unpacked into a cache outside of the clone. Prints the folder; all else goes to stderr.
#
# The cache is ${TRIVET_VM_CACHE:-${XDG_CACHE_HOME:-~/.cache}/trivet-vm}. A package is unpacked beside its
# place and renamed: it is whole or not there. What is there is used without a look for a newer one;
# TRIVET_VM_NEWEST=1 looks.
set -euo pipefail

cache=${TRIVET_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/trivet-vm}
# 6.12 is the first series in Debian 12 that has ublk; old versions vanish from the archive, so none is
# named here.
pattern='^linux-image-6\.12\.[0-9]+\+deb[0-9]+-amd64$'

say() { echo "vm: $*" >&2; }

need_host() {
  local missing=() pair
  for pair in qemu-system-x86_64:qemu-system-x86 xz:xz-utils mkfs.ext4:e2fsprogs fstrim:util-linux; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  [ ${#missing[@]} -eq 0 ] && return
  say "installing ${missing[*]}"
  install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  }
  install 2>/dev/null || { apt-get update -qq >&2 && install; }
}

newest_cached() { find "$cache" -mindepth 1 -maxdepth 1 -name 'linux-image-*' -printf '%f\n' 2>/dev/null | sort -V | tail -n 1; }

newest_package() { apt-cache search --names-only "$pattern" | cut -d' ' -f1 | sort -V | tail -n 1; }

temporary=
trap 'rm -rf "$temporary"' EXIT

# get PACKAGE downloads it; the lists of apt may be too old for that.
get() { [ -n "$1" ] && (cd "$temporary" && apt-get download -qq -o APT::Sandbox::User=root "$1" >&2); }

download() {
  local package
  mkdir -p "$cache"
  temporary=$(mktemp -d "$cache/new-XXXXXX")
  package=$(newest_package)
  [ -n "$package" ] && [ -d "$cache/$package" ] && return
  say "fetching ${package:-the lists of packages}"
  if ! get "$package" 2>/dev/null; then
    apt-get update -qq >&2
    package=$(newest_package)
    [ -n "$package" ] || { say "apt knows no package $pattern"; exit 1; }
    get "$package"
  fi
  dpkg-deb -x "$temporary/$package"_*.deb "$temporary/root"
  mv -T "$temporary/root" "$cache/$package" 2>/dev/null || [ -d "$cache/$package" ]
}

need_host
if [ -z "$(newest_cached)" ] || [ -n "${TRIVET_VM_NEWEST:-}" ]; then download; fi
echo "$cache/$(newest_cached)"
