#!/usr/bin/env bash
# Builds what the lab runs, into a cache outside of the clone, so that every clone finds it.
#
#   build.sh           build what is missing; print the seconds of each
#   build.sh --check   exit 0 if nothing is missing, else print one line and exit 1
#   build.sh --print   print the folder in which the lab finds everything (there or not)
#   build.sh --upstream        build, besides, Kubernetes' own tests of storage drivers, with what runs them
#   build.sh --print-upstream  print the folder of these (there or not)
#   build.sh --print-populator  print that of the volume populator which they use
#   build.sh --helm            build, besides, Helm
#   build.sh --print-helm      print its folder (there or not)
#
# The cache, ${TRIVET_E2E_CACHE:-${XDG_CACHE_HOME:-~/.cache}/trivet-e2e}, holds a folder for each part and
# one, all-HASH, of hard links to the files of the present parts. The name of a part has a hash over
# everything that decides what it is: go.mod, go.sum, flags and Go's version; so a new attacher does
# not rebuild Kubernetes. A part is built beside its place and renamed: it is whole or not there.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

cache=${TRIVET_E2E_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/trivet-e2e}
go=${GO:-go}
parts=(kubernetes etcd provisioner attacher resizer snapshotter pause debian)
debian_packages=(containerd runc containernetworking-plugins busybox-static)

# version_of MODULE PATH prints the version of a module that is required.
version_of() {
  awk -v path="$2" '{ sub(/^require /, "") } $1 == path && $2 ~ /^v/ { print $2; exit }' "build/$1/go.mod"
}

# kubernetes_flags sets the version that Kubernetes says it is.
kubernetes_flags() {
  local at=k8s.io/component-base/version version minor
  version=$(version_of kubernetes k8s.io/kubernetes)
  minor=${version#v1.}
  echo "-s -w -X $at.gitVersion=$version -X $at.gitMajor=1 -X $at.gitMinor=${minor%%.*}"
}

# sidecar_flags PART sets the version that a sidecar says it is.
sidecar_flags() {
  case $1 in
    provisioner) echo "-s -w -X main.version=$(version_of "$1" github.com/kubernetes-csi/external-provisioner/v6)" ;;
    attacher) echo "-s -w -X main.version=$(version_of "$1" github.com/kubernetes-csi/external-attacher/v4)" ;;
    resizer) echo "-s -w -X main.version=$(version_of "$1" github.com/kubernetes-csi/external-resizer/v2)" ;;
    snapshotter) echo "-s -w -X main.version=$(version_of "$1" github.com/kubernetes-csi/external-snapshotter/v8)" ;;
  esac
}

# recipe PART prints everything that decides what the part is.
recipe() {
  local module=build/$1
  case $1 in
    kubernetes | upstream) kubernetes_flags ;;
    provisioner | attacher | resizer | snapshotter) sidecar_flags "$1" ;;
    etcd) module=build/kubernetes ;;
    pause) module=cmd/pause ;;
    populator) module=cmd/hello-populator ;;
    debian)
      . /etc/os-release
      echo "${debian_packages[*]} ${ID:-unknown} ${VERSION_ID:-}" "$(uname -m)"
      return
      ;;
  esac
  echo "$1" "$go_version"
  cat "$module"/*.go "$module"/go.mod "$module"/go.sum 2>/dev/null || true
}

hash_of() { sha256sum | cut -c1-16; }

# compile MODULE LDFLAGS OUTPUT PACKAGE... builds static programs with the versions of MODULE.
compile() {
  local module=$1 ldflags=$2 output=$3
  shift 3
  (
    cd "$module"
    GOFLAGS=-mod=readonly CGO_ENABLED=0 "$go" build -trimpath -ldflags "$ldflags" -o "$output" "$@"
  )
}

# make_PART FOLDER puts the part's files there.
make_kubernetes() {
  local at=k8s.io/kubernetes/cmd
  compile build/kubernetes "$(kubernetes_flags)" "$1/" \
    $at/kube-apiserver $at/kubelet $at/kube-controller-manager $at/kube-scheduler $at/kubectl
}
make_etcd() { compile build/kubernetes "-s -w" "$1/etcd" go.etcd.io/etcd/server/v3; }
make_provisioner() {
  compile build/provisioner "$(sidecar_flags provisioner)" "$1/" \
    github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner
}
make_attacher() {
  compile build/attacher "$(sidecar_flags attacher)" "$1/" \
    github.com/kubernetes-csi/external-attacher/v4/cmd/csi-attacher
}
make_resizer() {
  compile build/resizer "$(sidecar_flags resizer)" "$1/" \
    github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer
}
# The snapshotter comes with what a cluster that takes snapshots has beside any driver: the controller and the kinds.
make_snapshotter() {
  local at=github.com/kubernetes-csi/external-snapshotter from
  compile build/snapshotter "$(sidecar_flags snapshotter)" "$1/" \
    $at/v8/cmd/csi-snapshotter $at/v8/cmd/snapshot-controller
  mkdir "$1/snapshots"
  from=$(cd build/snapshotter && "$go" list -m -f '{{.Dir}}' $at/client/v8)
  cp "$from"/config/crd/*snapshot*.yaml "$1/snapshots/"
  from=$(cd build/snapshotter && "$go" list -m -f '{{.Dir}}' $at/v8)
  cp "$from"/deploy/kubernetes/snapshot-controller/{rbac,setup}-snapshot-controller.yaml "$1/snapshots/"
  chmod 644 "$1"/snapshots/*
}
# The tests of all of Kubernetes would be several times as large; build/upstream imports those of storage drivers.
make_upstream() {
  compile build/upstream "$(kubernetes_flags)" "$1/" github.com/onsi/ginkgo/v2/ginkgo k8s.io/kubernetes/test/images/agnhost
  (
    cd build/upstream
    GOFLAGS=-mod=readonly CGO_ENABLED=0 "$go" test -c -vet=off -trimpath -ldflags "$(cd ../.. && kubernetes_flags)" -o "$1/upstream.test" .
  )
}
make_helm() { compile build/helm "-s -w" "$1/" helm.sh/helm/v3/cmd/helm; }
make_populator() { compile . "-s -w" "$1/hello-populator" ./cmd/hello-populator; }
make_pause() { compile . "-s -w" "$1/pause" ./cmd/pause; }

# Debian's packages are unpacked, not installed: nothing of the machine's own changes.
make_debian() {
  local files=$1/files file
  mkdir -p "$files" "$1/deb"
  download() { (cd "$files" && apt-get download -qq -o APT::Sandbox::User=root "${debian_packages[@]}"); }
  download 2>/dev/null || { apt-get update -qq && download; }
  for file in "$files"/*.deb; do dpkg-deb -x "$file" "$1/deb"; done
  rm -r "$files"
}

# need_host installs what the lab takes from the machine itself.
need_host() {
  local missing=() pair
  for pair in ip:iproute2 nsenter:util-linux mount:mount; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  [ "$(dpkg-query -W -f '${db:Status-Status}' libseccomp2 2>/dev/null)" = installed ] || missing+=(libseccomp2)
  [ ${#missing[@]} -eq 0 ] && return
  echo "installing ${missing[*]}"
  install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  }
  install 2>/dev/null || { apt-get update -qq && install; }
}

go_version=$("$go" version)
declare -A folder
for part in "${parts[@]}" upstream populator helm; do folder[$part]=$cache/$part-$(recipe "$part" | hash_of); done
all=$cache/all-$(for part in "${parts[@]}"; do echo "${folder[$part]}"; done | sort | sed 's|.*/||' | hash_of)

# build PART builds it unless it is there. (Not in an `if` or `||`: there bash would ignore errors inside.)
build() {
  local place=${folder[$1]} began=$SECONDS
  [ -d "$place" ] && return
  work=$(mktemp -d "$cache/.$1.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  echo "$1: building"
  "make_$1" "$work"
  put "$place"
  echo "$1: $((SECONDS - began)) s"
}

# put moves the finished folder to its place, unless another run of this script was faster.
put() {
  chmod 755 "$work"
  mv -T "$work" "$1" 2>/dev/null || { rm -rf "$work" && [ -d "$1" ]; }
  trap - EXIT
}

# join_parts makes the folder of links that the lab reads.
join_parts() {
  [ -d "$all" ] && return
  local part
  work=$(mktemp -d "$cache/.all.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  for part in "${parts[@]}"; do cp -al "${folder[$part]}/." "$work/"; done
  put "$all"
}

case ${1:-} in
  --print) echo "$all" ;;
  --print-upstream) echo "${folder[upstream]}" ;;
  --print-populator) echo "${folder[populator]}" ;;
  --print-helm) echo "${folder[helm]}" ;;
  --check)
    [ -d "$all" ] && exit 0
    missing=()
    for part in "${parts[@]}"; do [ -d "${folder[$part]}" ] || missing+=("$part"); done
    echo "e2e: not built yet: ${missing[*]:-the joint folder}; e2e/build.sh builds it (the first time about 20 minutes)"
    exit 1
    ;;
  "" | --upstream | --helm)
    mkdir -p "$cache"
    need_host
    for part in "${parts[@]}"; do build "$part"; done
    join_parts
    [ -z "${1:-}" ] || build "${1#--}"
    [ "${1:-}" != --upstream ] || build populator
    ;;
  *)
    echo "build.sh: unknown argument $1; see the comment at its top" >&2
    exit 2
    ;;
esac
