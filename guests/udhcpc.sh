#!/bin/sh
# What busybox' DHCP client runs in the guest: gives the interface what the server said.
case $1 in
deconfig)
    ip link set "$interface" up
    ;;
bound | renew)
    ip -4 addr flush dev "$interface"
    ip addr add "$ip/$mask" dev "$interface"
    # $router and $dns may be lists.
    for gateway in $router; do
        ip route replace default via "$gateway"
        break
    done
    echo "search $domain" >/etc/resolv.conf
    for server in $dns; do
        echo "nameserver $server" >>/etc/resolv.conf
    done
    ;;
esac
