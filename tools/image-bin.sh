#!/bin/sh
# Makes programs of a Debian image runnable on this host, without root or chroot: Open vSwitch's, etcd, QEMU. Writes
# one wrapper per program that starts it through the image's own loader and libraries, whatever the
# host's libc. The databases' schemas, where the image has them, go into OUTDIR/schemas. Tests look in
# ${XDG_CACHE_HOME:-$HOME/.cache}/segue/image-bin unless SEGUE_OVS_BIN (and SEGUE_OVN_SCHEMAS) say otherwise.
set -eu

usage() {
    echo "usage: ${0##*/} IMAGE OUTDIR" >&2
    echo "  IMAGE   root of a Debian file system with openvswitch-switch and etcd-server installed" >&2
    echo "  OUTDIR  where to write wrappers for ovsdb-server, ovsdb-tool, ovsdb-client, ovs-appctl," >&2
    echo "          ovs-vsctl, ovs-ofctl, ovs-vswitchd, etcd, and in OUTDIR/schemas Open vSwitch's schema," >&2
    echo "          and OVN's if the image has ovn-common; qemu-system-x86_64 if it has that" >&2
    exit 2
}

[ $# -eq 2 ] || usage
image=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)

# The loader's name is part of the architecture's ABI; the image holds exactly one.
loader=
for candidate in "$image"/lib64/ld-linux-*.so.* "$image"/lib/ld-linux-*.so.*; do
    [ -e "$candidate" ] && loader=$candidate && break
done
[ -n "$loader" ] || { echo "${0##*/}: no dynamic loader in $image" >&2; exit 1; }

libraries=
for directory in "$image"/usr/lib/*-linux-gnu "$image"/lib/*-linux-gnu; do
    [ -d "$directory" ] && libraries="${libraries:+$libraries:}$directory"
done

# What Debian calls /usr/sbin/ovs-vswitchd leads out of the image: an alternative, by an absolute link.
for tool in sbin/ovsdb-server bin/ovsdb-tool bin/ovsdb-client bin/ovs-appctl bin/ovs-vsctl bin/ovs-ofctl \
    lib/openvswitch-switch/ovs-vswitchd bin/etcd; do
    if [ ! -x "$image/usr/$tool" ]; then
        echo "${0##*/}: $image has no /usr/$tool: are openvswitch-switch and etcd-server installed there?" >&2
        exit 1
    fi
    # A static program takes no loader.
    start="'$loader' --library-path '$libraries'"
    "$loader" --verify "$image/usr/$tool" || start=
    wrapper=$out/${tool##*/}
    # Renamed into place, so that a test starting at this moment never runs half a script.
    cat > "$wrapper.new" <<EOF
#!/bin/sh
exec $start '$image/usr/$tool' "\$@"
EOF
    chmod +x "$wrapper.new"
    mv "$wrapper.new" "$wrapper"
done
# QEMU, for tests without libvirt, where the image has it: with its firmware and its modules.
if [ -x "$image/usr/bin/qemu-system-x86_64" ]; then
    modules=
    for directory in "$image"/usr/lib/*-linux-gnu/qemu; do
        [ -d "$directory" ] && modules=$directory
    done
    cat > "$out/qemu-system-x86_64.new" <<EOF
#!/bin/sh
export QEMU_MODULE_DIR='$modules'
exec '$loader' --library-path '$libraries' '$image/usr/bin/qemu-system-x86_64' \\
    -L '$image/usr/share/qemu' -L '$image/usr/share/seabios' "\$@"
EOF
    chmod +x "$out/qemu-system-x86_64.new"
    mv "$out/qemu-system-x86_64.new" "$out/qemu-system-x86_64"
fi
for schema in openvswitch/vswitch ovn/ovn-nb ovn/ovn-sb; do
    found=$image/usr/share/$schema.ovsschema
    schema=${schema#*/}
    [ -f "$found" ] || continue
    mkdir -p "$out/schemas"
    cp "$found" "$out/schemas/$schema.new"
    mv "$out/schemas/$schema.new" "$out/schemas/$schema.ovsschema"
done
echo "$out"
