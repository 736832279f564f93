/*
 * A steady mix of kernel work: processes, files, pipes, reads of /proc. Counts rounds in a file
 * (/run/workload by default, as text), so that a scenario can see that the guest makes progress.
 * Runs until killed.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void read_all(const char *path)
{
	char buf[4096];
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		return;
	while (read(fd, buf, sizeof buf) > 0)
		;
	close(fd);
}

static int through_a_pipe(void)
{
	char out[512], in[512];
	int fd[2];
	memset(out, 0x5a, sizeof out);
	if (pipe(fd))
		return 1;
	int bad = write(fd[1], out, sizeof out) != sizeof out ||
		  read(fd[0], in, sizeof in) != sizeof in || memcmp(in, out, sizeof in);
	close(fd[0]);
	close(fd[1]);
	return bad;
}

static int through_a_file(long round)
{
	long back = -1;
	char path[64];
	snprintf(path, sizeof path, "/tmp/workload.%d", (int)getpid());
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0)
		return 1;
	int bad = write(fd, &round, sizeof round) != sizeof round ||
		  pread(fd, &back, sizeof back, 0) != sizeof back || back != round;
	close(fd);
	unlink(path);
	return bad;
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "--child"))
		return 42;
	const char *counter = argc > 1 ? argv[1] : "/run/workload";
	for (long round = 1;; round++) {
		int status = 0;
		pid_t pid = fork();
		if (!pid) {
			execl("/proc/self/exe", argv[0], "--child", (char *)NULL);
			_exit(1);
		}
		int bad = waitpid(pid, &status, 0) != pid || !WIFEXITED(status) ||
			  WEXITSTATUS(status) != 42;
		bad |= through_a_pipe();
		bad |= through_a_file(round);
		read_all("/proc/self/maps");
		read_all("/proc/meminfo");
		read_all("/proc/version");
		char text[64], tmp[128];
		int n = snprintf(text, sizeof text, "%ld\n", round);
		snprintf(tmp, sizeof tmp, "%s.new", counter);
		int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC, 0644);
		if (fd >= 0) {
			bad |= write(fd, text, (size_t)n) != n;
			close(fd);
			rename(tmp, counter);
		}
		if (bad) {
			printf("workload: round %ld went wrong\n", round);
			return 1;
		}
		nanosleep(&(struct timespec){ 0, 2000000 }, NULL);
	}
}
