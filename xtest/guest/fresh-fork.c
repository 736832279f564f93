/*
 * A child that never runs: it and its parent may run on CPU 1 only, with a fixed priority, and the
 * parent, who came first, never leaves user mode. Prints the child's id. Runs until killed.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <sys/types.h>
#include <unistd.h>

int main(void)
{
	struct sched_param param = { .sched_priority = 10 };
	cpu_set_t cpu;
	CPU_ZERO(&cpu);
	CPU_SET(1, &cpu);
	if (sched_setaffinity(0, sizeof cpu, &cpu) || sched_setscheduler(0, SCHED_FIFO, &param)) {
		perror("fresh-fork");
		return 1;
	}
	pid_t child = fork();
	if (child < 0)
		return 1;
	if (child == 0) {
		pause();
		return 0;
	}
	printf("%d\n", child);
	fflush(stdout);
	for (;;)
		__asm__ volatile("pause");
}
