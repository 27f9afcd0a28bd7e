#!/bin/sh
# Compiles a program of 20 C files one by one, links it and runs it: it says whether all its modules work.
directory=/tmp/modules.$$
mkdir $directory && cd $directory || exit 1
for file in /bench/modules/*.c; do
    gcc -O1 -Wall -c "$file" || exit 1
done
gcc -o program ./*.o && ./program
status=$?
cd / && rm -r $directory
exit $status
