#!/usr/bin/env bash
# Prints the directory that holds etcd, kube-apiserver and kubectl; builds the two that Debian has not first where needed.
set -euo pipefail

usage() {
	cat <<'EOF'
Usage: tools/kubernetes/build.sh [--if-built | --help]

Prints the directory that holds etcd, kube-apiserver and kubectl, and nothing else, on standard
output. Progress and errors go to standard error.

  KUBEBUILDER_ASSETS  A directory that has the three already: it is used as it is.

Where it is unset, kube-apiserver and kubectl of the version pinned in go.mod and go.sum are built once,
with the Go toolchain found in PATH, into ${XDG_CACHE_HOME:-$HOME/.cache}/segue/kubernetes/. That takes
about 8 minutes of processor time; what an interrupted build has compiled is not compiled again. etcd
is that of the lab's image: what stands in its place starts the one that tools/image-bin.sh provides.

  --if-built          Builds nothing: fails where there is nothing to print.
EOF
}

die() {
	printf 'tools/kubernetes: %s\n' "$@" >&2
	exit 1
}

say() {
	printf 'tools/kubernetes: %s\n' "$*" >&2
}

# The programs that the directory $1 lacks.
missing() {
	local program
	for program in etcd kube-apiserver kubectl; do
		[ -x "$1/$program" ] || printf ' %s' "$program"
	done
}

# Fails with a remedy unless a Go that can build go.mod is in PATH. No toolchain is downloaded:
# what is built follows from this directory and the installed Go alone.
require_go() {
	local wanted have
	wanted=$(sed -n 's/^go \([0-9.]*\)$/\1/p' go.mod)
	command -v go >/dev/null ||
		die "go is not in PATH; Go $wanted or newer is needed to build kube-apiserver." \
			"Install it (https://go.dev/dl), or set KUBEBUILDER_ASSETS to a directory with etcd, kube-apiserver and kubectl."
	have=$(cd / && go env GOVERSION)
	[ "$(printf '%s\n' "$wanted" "${have#go}" | sort -V | head -n 1)" = "$wanted" ] ||
		die "$(command -v go) is ${have}; Go $wanted or newer is needed to build kube-apiserver." \
			"Update it (https://go.dev/dl), or set KUBEBUILDER_ASSETS to a directory with etcd, kube-apiserver and kubectl."
}

# Turns what go says line by line (downloads; with -v, packages) into one progress line; $1 is what is
# counted, $2 the most there can be. Everything else passes.
progress() {
	awk -v terminal="$([ -t 2 ] && echo 1 || echo 0)" -v what="$1" -v most="$2" '
		/^go: downloading / || /^[A-Za-z0-9][^ ]*$/ {
			count++
			line = sprintf("tools/kubernetes: %d%s %s", count, most ? " of at most " most : "", what)
			if (terminal) printf "\r\033[K%s", line
			else if (count % 200 == 0) print line
			fflush()
			next
		}
		{ if (terminal) printf "\r\033[K"; print; fflush() }
		END { if (terminal) printf "\r\033[K" }' >&2
}

build() {
	local into=$1 version=$2 stamp=k8s.io/component-base/version minor total
	local packages=(k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kubectl)
	minor=${version#v1.}
	say "fetching the modules of Kubernetes $version"
	go list -deps "${packages[@]}" 2>&1 >"$into/deps" | progress "modules fetched" 0
	total=$(wc -l <"$into/deps")
	rm "$into/deps"
	say "building kube-apiserver and kubectl (about 8 minutes of processor time, once)"
	# One invocation: the two share most of their packages. -s -w and no cgo: less to link.
	go build -v -trimpath \
		-ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=${minor%%.*} -X $stamp.gitTreeState=clean" \
		-o "$into/" "${packages[@]}" 2>&1 | progress "packages built" "$total"
	cat >"$into/etcd" <<-EOF
		#!/bin/sh
		exec '$etcd' "\$@"
	EOF
	chmod +x "$into/etcd"
}

if_built=
case ${1:-} in
'') ;;
--if-built) if_built=1 ;;
-h | --help)
	usage
	exit
	;;
*)
	usage >&2
	exit 2
	;;
esac

if [ -n "${KUBEBUILDER_ASSETS:-}" ]; then
	lacks=$(missing "$KUBEBUILDER_ASSETS")
	[ -z "$lacks" ] ||
		die "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS has no$lacks." \
			"Point it to a directory with etcd, kube-apiserver and kubectl, or unset it to have them built."
	(cd "$KUBEBUILDER_ASSETS" && pwd)
	exit
fi

cd "$(dirname "${BASH_SOURCE[0]}")"
version=$(sed -n 's/^\tk8s\.io\/kubernetes \(v[0-9.]*\).*/\1/p' go.mod)
pins=$(cat go.mod go.sum | sha256sum)
etcd=${XDG_CACHE_HOME:-$HOME/.cache}/segue/image-bin/etcd
cache=${XDG_CACHE_HOME:-$HOME/.cache}/segue/kubernetes
final=$cache/$version-${pins:0:12}/bin

if [ -z "$(missing "$final")" ]; then
	echo "$final"
	exit
fi
[ -z "$if_built" ] || die "kube-apiserver and kubectl are not built yet; \`make tools\` does it."

export GOTOOLCHAIN=local CGO_ENABLED=0 GOWORK=off
require_go
mkdir -p "$cache"
exec 9>"$cache/lock"
if ! flock -n 9; then
	say "waiting for another build"
	flock 9
fi
# The lock is free again: either that build has finished, or it was interrupted.
if [ -n "$(missing "$final")" ]; then
	rm -rf "$cache"/building.*
	scratch=$(mktemp -d "$cache/building.XXXXXX")
	trap 'rm -rf "$scratch"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
	mkdir "$scratch/bin"
	build "$scratch/bin" "$version"
	# One rename: the directory is complete or it is not there.
	mkdir -p "${final%/*}"
	rm -rf "$final"
	mv "$scratch/bin" "$final"
fi
echo "$final"
