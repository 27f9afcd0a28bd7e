#!/bin/busybox sh
# Measures what it is told to, the same here and in guests. It reads lines "NUMBER BOX_MS ROW [ARGUMENT...]" and answers each with
# the rows that suite.sh prints, between "CLOCK NUMBER uptime" and "DONE NUMBER uptime"; the times are this system's own.
echo "WORKER ready"
while read -r number box row; do
    read -r up _ </proc/uptime
    echo "CLOCK $number $up"
    # shellcheck disable=SC2086
    BENCH_BOX_MS=$box /bench/suite.sh $row
    read -r up _ </proc/uptime
    echo "DONE $number $up"
done
