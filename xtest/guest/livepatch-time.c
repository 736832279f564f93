/*
 * `livepatch-time FILE NAME ROUNDS`: loads a livepatch module and unloads it again, as often as asked.
 * Prints a line for each: microseconds from insmod until the end of the transition, of insmod alone,
 * and from disabling until the end of that transition.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char transition[256], enabled[256];

static long now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void rest(void)
{
	nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

/* Whether it is under way; a patch that is disabled goes away at the end of its transition. */
static int under_way(void)
{
	char c = '0';
	int fd = open(transition, O_RDONLY);

	if (fd < 0)
		return 0;
	if (read(fd, &c, 1) < 0)
		c = '0';
	close(fd);
	return c == '1';
}

static void write_to(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		fail(path);
	close(fd);
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 64;
	snprintf(transition, sizeof transition, "/sys/kernel/livepatch/%s/transition", argv[2]);
	snprintf(enabled, sizeof enabled, "/sys/kernel/livepatch/%s/enabled", argv[2]);
	for (int n = atoi(argv[3]); n > 0; n--) {
		long began = now_us();
		int fd = open(argv[1], O_RDONLY);

		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			fail(argv[1]);
		close(fd);
		long loaded = now_us();
		while (under_way())
			rest();
		long done = now_us();
		write_to(enabled, "0");
		while (under_way())
			rest();
		long undone = now_us();
		/* it may still be busy going away */
		for (int tries = 0; syscall(SYS_delete_module, argv[2], O_NONBLOCK); tries++) {
			if (tries == 10000)
				fail("unloading");
			rest();
		}
		printf("%ld %ld %ld\n", done - began, loaded - began, undone - done);
		fflush(stdout);
	}
	return 0;
}
