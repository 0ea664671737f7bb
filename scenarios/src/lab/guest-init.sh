#!/bin/busybox sh
# First process of a guest. Its interfaces come on the kernel's command line, one word each:
#   segue.nic=MAC,IPV4/BITS,IPV6/BITS,GATEWAY4,GATEWAY6        with - for what it does not have
# and "dhcp:" in front of an address that it has to ask for.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
	[ -e "$module" ] && insmod "$module"
done

# Peers learn of a guest that has moved from the guest's own announcements.
echo 1 >/proc/sys/net/ipv4/conf/default/arp_notify
echo 1 >/proc/sys/net/ipv6/conf/default/ndisc_notify
# Nobody else has these addresses, and waiting for the proof of that would delay the first answer by a second.
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
ip link set lo up

configure() {
	local mac=$1 v4=$2 v6=$3 gateway4=$4 gateway6=$5 path dev=
	for path in /sys/class/net/*; do
		[ "$(cat "$path/address")" = "$mac" ] && dev=${path##*/}
	done
	if [ -z "$dev" ]; then
		echo "segue: no interface has address $mac"
		return
	fi
	echo 1 >/proc/sys/net/ipv4/conf/$dev/arp_notify
	echo 1 >/proc/sys/net/ipv6/conf/$dev/ndisc_notify
	echo 0 >/proc/sys/net/ipv6/conf/$dev/accept_dad
	ip link set "$dev" up
	case $v4 in
	-) ;;
	# Asks every second until there is an answer, and then stays to renew the lease.
	dhcp:*) udhcpc -i "$dev" -s /dhcp -O staticroutes -O mtu -t 60 -T 1 -n ;;
	*) ip addr add "$v4" dev "$dev" ;;
	esac
	case $v6 in
	-) ;;
	dhcp:*)
		if command -v udhcpc6 >/dev/null; then
			# It asks from its link-local address, which it has only once the kernel has seen that there is a link.
			until ip -6 addr show dev "$dev" | grep -q 'scope link'; do sleep 0.05; done
			udhcpc6 -i "$dev" -s /dhcp -t 60 -T 1 -n
		else
			# Debian 12's busybox has no such client.
			ip -6 addr add "${v6#dhcp:}" dev "$dev"
		fi
		;;
	*) ip -6 addr add "$v6" dev "$dev" ;;
	esac
	# A gateway need not be in the guest's own prefix.
	if [ "$gateway4" != - ]; then
		ip route add "$gateway4" dev "$dev"
		ip route add default via "$gateway4" dev "$dev"
	fi
	[ "$gateway6" = - ] || ip -6 route add default via "$gateway6" dev "$dev"
}

for word in $(cat /proc/cmdline); do
	case $word in
	segue.nic=*)
		IFS=,
		set -- ${word#segue.nic=}
		unset IFS
		configure "$@"
		;;
	esac
done

# Commands over the second serial port, one line each: a word that tells answers apart, and what the shell is to do.
# The answer stands between two lines that begin with the word; the second ends with the command's status. A command
# that hangs must not be the last.
answer() {
	while read -r word command; do
		echo "$word begin"
		timeout 30 sh -c "$command" </dev/null 2>&1
		printf '\n%s end %s\n' "$word" $?
	done
}
# Opened before this guest says that it is ready: what comes earlier is lost.
exec 3<>/dev/ttyS1
stty raw -echo <&3
answer <&3 >&3 &

# One server on port 7000: the reflector, or without one an echo of what comes over TCP.
serve() {
	if [ -x /bin/dataplane-probe ]; then
		dataplane-probe reflect --port 7000 --may-call --realtime
	else
		nc -ll -p 7000 -e /bin/cat
	fi
}
while :; do
	serve
	echo "segue: the server on port 7000 ended ($?)"
	sleep 1
done &
until netstat -lnt | grep -q ':7000 '; do sleep 0.05; done
echo "segue: ready"
while :; do sleep 3600; done
