/* The program that fork_exec starts. */
int main(void)
{
    return 0;
}
