/*
 * elapsed NAME PROGRAM [ARGUMENT...]: prints the seconds that a program took, with its output thrown away.
 */
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rate.h"

int main(int count, char **arguments)
{
    double begin = seconds_now();
    int status;
    pid_t child;

    require(count >= 3, "elapsed NAME PROGRAM [ARGUMENT...]");
    child = fork();
    if (child == 0) {
        int nowhere = open("/dev/null", O_WRONLY);

        dup2(nowhere, STDOUT_FILENO);
        execvp(arguments[2], arguments + 2);
        _exit(127);
    }
    require(child > 0 && waitpid(child, &status, 0) == child && status == 0, arguments[1]);
    print_row(arguments[1], seconds_now() - begin);
    return 0;
}
