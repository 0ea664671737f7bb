#!/bin/sh
# Makes the OVSDB tools of a Debian image runnable on this host, without root or chroot: writes one
# wrapper per tool that starts it through the image's own loader and libraries, whatever the host's
# libc. OVN's schemas, where the image has them, go into OUTDIR/schemas. Tests look in
# ${XDG_CACHE_HOME:-$HOME/.cache}/segue/ovs-bin unless SEGUE_OVS_BIN (and SEGUE_OVN_SCHEMAS) say otherwise.
set -eu

usage() {
    echo "usage: ${0##*/} IMAGE OUTDIR" >&2
    echo "  IMAGE   root of a Debian file system with openvswitch-switch installed" >&2
    echo "  OUTDIR  where to write wrappers for ovsdb-server, ovsdb-tool, ovsdb-client, ovs-appctl," >&2
    echo "          and OVN's schemas in OUTDIR/schemas if the image has ovn-common" >&2
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

for tool in sbin/ovsdb-server bin/ovsdb-tool bin/ovsdb-client bin/ovs-appctl; do
    if [ ! -x "$image/usr/$tool" ]; then
        echo "${0##*/}: $image has no /usr/$tool: is openvswitch-switch installed there?" >&2
        exit 1
    fi
    wrapper=$out/${tool##*/}
    # Renamed into place, so that a test starting at this moment never runs half a script.
    cat > "$wrapper.new" <<EOF
#!/bin/sh
exec '$loader' --library-path '$libraries' '$image/usr/$tool' "\$@"
EOF
    chmod +x "$wrapper.new"
    mv "$wrapper.new" "$wrapper"
done
for schema in ovn-nb ovn-sb; do
    found=$image/usr/share/ovn/$schema.ovsschema
    [ -f "$found" ] || continue
    mkdir -p "$out/schemas"
    cp "$found" "$out/schemas/$schema.new"
    mv "$out/schemas/$schema.new" "$out/schemas/$schema.ovsschema"
done
echo "$out"
