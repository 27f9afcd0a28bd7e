#!/bin/sh
# What shell scripts do most: 250 command substitutions, which fork, and 250 programs, which are forked and executed.
i=0
while [ $i -lt 250 ]; do
    [ "$(echo $i)" = $i ] || exit 1
    /bench/nothing || exit 1
    i=$((i + 1))
done
