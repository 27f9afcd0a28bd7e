# Break points, single steps, a hardware and a software watch point, and changing a value under way.
set pagination off
set confirm off
set disable-randomization off
set startup-with-shell off
break main
run
next
next
step
info locals
stepi
stepi
stepi
stepi
print value
finish
watch watched
continue
continue
info watchpoints
delete
set can-use-hw-watchpoints 0
watch scaled
continue
print scaled
delete
tbreak step
continue
backtrace 2
print $eflags
set variable value = value + 0
x/3i $pc
continue
