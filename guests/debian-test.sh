#!/bin/sh
# Runs in the root of the test image when everything is installed. Servers start when a test wants them.
set -eu
systemctl --quiet disable nginx.service iperf3.service fstrim.timer 2>/dev/null || true
# A page of the size that small pages have, and a server that does not log: the disk is not what is measured.
head -c 1024 /dev/zero | tr '\0' h >/var/www/html/page
sed -i 's|access_log .*;|access_log off;|' /etc/nginx/nginx.conf
