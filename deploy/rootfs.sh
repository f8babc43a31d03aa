#!/usr/bin/env bash
# rootfs.sh CACHE: makes the root folder of the image from Debian packages and prints its path, CACHE/rootfs-KEY.
#
# The packages come from this machine's own apt sources and are checked by apt. KEY is a digest of their names and
# versions and of this script, so a second call does no work until one of them changes. No package is installed and none
# of its scripts run, on this machine or in the image; root is not needed. It needs apt and dpkg, so Debian, and fresh
# lists of packages (`apt-get update`).
set -euo pipefail
export LC_ALL=C
umask 022

# What trivet server calls (mkfs, fsck, blkid, mount, losetup, resize2fs, xfs_growfs), and a shell for an operator.
packages=(base-files btrfs-progs coreutils dash e2fsprogs grep mawk mount util-linux xfsprogs)
# Packages that apt takes for installed already, so that neither they nor what only they need come along: they are for
# the configuration of packages, and for the programs in `unused`. The writer of the image (tools/image) refuses an
# image in which a program lacks a library.
assumed=(debconf debianutils dpkg libicu72 python3 util-linux-extra)
# Programs that need an assumed package or bash: online checks and the shutdown of device-mapper. Nothing calls them.
unused=(usr/sbin/{xfs_scrub,xfs_scrub_all,e2scrub,e2scrub_all,blkdeactivate})
# What nothing here runs or reads. The copyright files under usr/share/doc stay: whoever passes the image on owes them.
unread=(etc/cron.d etc/cron.daily etc/cron.weekly etc/init.d etc/pam.d etc/security
  usr/lib/systemd usr/lib/udev 'usr/lib/*/e2fsprogs' 'usr/lib/*/gconv' usr/share/bash-completion
  usr/share/bug usr/share/gcc usr/share/info usr/share/initramfs-tools
  usr/share/lintian usr/share/locale usr/share/man usr/share/perl5)

fail() {
  echo "rootfs: $*" >&2
  exit 1
}

[ $# -eq 1 ] || fail "usage: rootfs.sh CACHE"
for tool in apt-get dpkg dpkg-deb tar; do
  command -v "$tool" >/dev/null || fail "$tool is not here: the image is made of Debian packages, on Debian"
done
mkdir -p "$1"
cache=$(cd "$1" && pwd)

# apt_install ARCHIVES ARGUMENT...: apt-get install with this machine's sources and lists and a state of our own, in
# which only the assumed packages are installed. It downloads to ARCHIVES and touches nothing else.
apt_install() {
  local archives=$1
  shift
  mkdir -p "$archives/partial"
  apt-get -qq -y --no-install-recommends --download-only \
    -o Dir::State::status="$cache/apt/status" -o Dir::State::extended_states="$cache/apt/extended_states" \
    -o Dir::Cache="$cache/apt" -o Dir::Cache::pkgcache=pkgcache.bin -o Dir::Cache::archives="$archives" \
    -o APT::Sandbox::User=root "$@" install "${packages[@]}"
}

# list_packages prints one line for each package: its file, its size, its hash.
list_packages() {
  local name
  mkdir -p "$cache/apt"
  for name in "${assumed[@]}"; do
    printf 'Package: %s\nStatus: install ok installed\nArchitecture: %s\nMulti-Arch: allowed\n' \
      "$name" "$(dpkg --print-architecture)"
    printf 'Version: 9999\nMaintainer: nobody\nDescription: not in the image\n\n'
  done >"$cache/apt/status"
  # An archive that is there already is left out of what apt prints, so it looks into an empty folder.
  apt_install "$cache/apt/none" --print-uris | cut -d' ' -f2- | sort
}

# unpack ROOT FILE...: the files of the packages, in a root whose /bin, /lib and so on are links into /usr.
unpack() {
  local root=$1 dir file
  shift
  for dir in bin lib lib64 sbin; do
    mkdir -p "$root/usr/$dir"
    ln -s "usr/$dir" "$root/$dir"
  done
  for file in "$@"; do # dpkg-deb -x would put folders in the place of the links
    dpkg-deb --fsys-tarfile "$file" | tar -x -p --no-same-owner --keep-directory-symlink -C "$root" ||
      fail "unpack $file: see above"
  done
  find "$root" -perm /6000 -exec chmod ug-s {} + # the server is root already, and this folder is not only the image's
  [ -n "$(ls "$root/usr/lib64")" ] || rm -r "$root/lib64" "$root/usr/lib64"
}

# prune ROOT removes what is neither run nor read.
prune() {
  local root=$1 path
  for path in "${unused[@]}"; do
    rm "$root/$path"
  done
  for path in "${unread[@]}"; do
    # shellcheck disable=SC2086 # a pattern
    rm -rf "$root"/$path
  done
  find "$root/usr/share/doc" -type f ! -name copyright -delete
  find "$root/usr/share/doc" -xtype l -delete
  find "$root/usr/share/doc" -type d -empty -delete
}

# configure ROOT FILE...: what the scripts of the packages would have done, as far as it matters here.
configure() {
  local root=$1 file
  shift
  [ -e "$root/usr/bin/sh" ] || ln -s dash "$root/usr/bin/sh"
  ln -s mawk "$root/usr/bin/awk"
  rmdir "$root/var/run" "$root/var/lock"
  ln -s /run "$root/var/run"
  ln -s /run/lock "$root/var/lock"
  ln -s ../proc/self/mounts "$root/etc/mtab"
  echo '# nothing is mounted by name here' >"$root/etc/fstab"
  printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'nobody:x:65534:65534:nobody:/nonexistent:/bin/false' \
    'nonroot:x:65532:65532:nonroot:/nonexistent:/bin/false' >"$root/etc/passwd"
  printf '%s\n' 'root:x:0:' 'disk:x:6:' 'nogroup:x:65534:' 'nonroot:x:65532:' >"$root/etc/group"
  printf '%s\n' 'passwd: files' 'group: files' 'hosts: files dns' >"$root/etc/nsswitch.conf"
  mkdir -p "$root/var/lib/dpkg"
  for file in "$@"; do # for scanners, which compare the versions with the known vulnerabilities
    dpkg-deb -f "$file" | sed '1a Status: install ok installed'
    echo
  done >"$root/var/lib/dpkg/status"
}

list=$(list_packages) || fail "apt cannot find ${packages[*]}: see above"
[ -n "$list" ] || fail "apt knows none of the packages: run apt-get update"
key=$( (cat "${BASH_SOURCE[0]}" && dpkg --print-architecture && echo "$list") | sha256sum | cut -c1-16)
root=$cache/rootfs-$key
if [ ! -d "$root" ]; then
  echo "rootfs: making the image's root folder from $(wc -l <<<"$list") Debian packages" >&2
  apt_install "$cache/debs" >/dev/null ||
    fail "apt cannot download the packages: if its lists are old, run apt-get update"
  files=()
  while read -r name _; do files+=("$cache/debs/$name"); done <<<"$list"
  rm -rf "$cache/new"
  unpack "$cache/new" "${files[@]}"
  prune "$cache/new"
  configure "$cache/new" "${files[@]}"
  rm -rf "$cache"/rootfs-* # of packages that have been replaced since
  mv "$cache/new" "$root"
fi
echo "$root"
