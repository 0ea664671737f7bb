#!/bin/bash
# Sees to the host packages that the lab and the tests need; the rest runs from the lab's own image.
set -eu
declare -A needs=([mmdebstrap]=mmdebstrap [ip]=iproute2 [ethtool]=ethtool [nft]=nftables)
missing=()
for program in "${!needs[@]}"; do
    command -v "$program" >/dev/null || [ -x "/usr/sbin/$program" ] || [ -x "/sbin/$program" ] ||
        missing+=("${needs[$program]}")
done
for program in cargo go cc; do
    if ! command -v "$program" >/dev/null; then
        echo "error: $program is not on the PATH. segue needs Rust (rustup; rust-toolchain.toml names the version)," \
            "Go 1.24 or later (to build kube-apiserver) and a C compiler." >&2
        exit 1
    fi
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: missing ${missing[*]}. As root: apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "==> Installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
