#!/bin/busybox sh
# Takes what DHCP gives: udhcpc and udhcpc6 call it with what happened, and with what they were given in the environment.
case $1 in
bound | renew) ;;
*) exit 0 ;;
esac
if [ -n "$ipv6" ]; then
	# DHCPv6 gives an address and no prefix (RFC 8415, section 18.2.10.1), and routes never.
	ip -6 addr replace "${ipv6%/*}/128" dev "$interface"
	exit
fi
ip addr replace "$ip/${mask:-32}" dev "$interface"
[ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
# Option 121 comes instead of the router option (RFC 3442); a router of 0.0.0.0 means that the destination is on the link.
set -- $staticroutes
[ $# -gt 0 ] || set -- ${router:+"$router/32" 0.0.0.0 0.0.0.0/0 "$router"}
while [ $# -ge 2 ]; do
	if [ "$2" = 0.0.0.0 ]; then
		ip route replace "$1" dev "$interface"
	else
		ip route replace "$1" via "$2" dev "$interface"
	fi
	shift 2
done
