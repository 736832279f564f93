/*
 * Process 1 of a guest of the testbed: runs commands that come over the Xen console, and hands back their
 * output when asked. Lines only, each with a CRC-32 before its end, as "~OP ARGS CRC\n":
 *
 *   ~P ID            are you there?            -> ~O ID
 *   ~R ID SECS B64   run this shell command    -> ~W ID (runs), later ~A ID RC TIMEDOUT OUT ERR Z
 *   ~G ID K OFF LEN  a piece of output K=o|e|z -> ~C ID K OFF B64
 *   ~D ID            forget it                 -> ~O ID
 *
 * Every request may be repeated without harm, so a line lost to a kernel message costs only time.
 * Output goes to files: the asker pulls it, which is all the flow control there is. Output above
 * 2 KiB is offered gzipped as well (Z, its size), since the console is slow.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define LINE (512 * 1024)
#define PIECE (64 * 1024)
#define JOBS 32

enum state { FREE, RUNS, PACKS, DONE };
static struct job {
	enum state state;
	char id[24];
	pid_t pid;
	int rc, timed_out;
	long deadline;
} jobs[JOBS];

static int con;
static char line[LINE], reply[PIECE * 2];
static unsigned char data[LINE];
static uint32_t crc_table[256];

static void crc_init(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;
		for (int k = 0; k < 8; k++)
			c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
		crc_table[i] = c;
	}
}

static uint32_t crc32(const char *p, size_t n)
{
	uint32_t c = ~0u;
	while (n--)
		c = crc_table[(c ^ (unsigned char)*p++) & 0xff] ^ (c >> 8);
	return ~c;
}

static const char b64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static size_t encode(char *out, const unsigned char *in, size_t n)
{
	char *o = out;
	for (size_t i = 0; i < n; i += 3) {
		uint32_t v = (uint32_t)in[i] << 16 | (i + 1 < n ? in[i + 1] << 8 : 0) |
			     (i + 2 < n ? in[i + 2] : 0);
		*o++ = b64[v >> 18];
		*o++ = b64[v >> 12 & 63];
		*o++ = i + 1 < n ? b64[v >> 6 & 63] : '=';
		*o++ = i + 2 < n ? b64[v & 63] : '=';
	}
	*o = 0;
	return (size_t)(o - out);
}

static size_t decode(unsigned char *out, const char *in)
{
	unsigned char *o = out;
	uint32_t v = 0;
	int bits = 0;
	for (; *in; in++) {
		const char *at = strchr(b64, *in);
		if (!at)
			break;
		v = v << 6 | (uint32_t)(at - b64);
		bits += 6;
		if (bits >= 8) {
			bits -= 8;
			*o++ = (unsigned char)(v >> bits);
		}
	}
	*o = 0;
	return (size_t)(o - out);
}

static void say(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(reply + 2, sizeof reply - 32, fmt, ap);
	va_end(ap);
	reply[0] = '\n';
	reply[1] = '~';
	n += 2;
	n += sprintf(reply + n, " %08x\n", crc32(reply + 2, (size_t)n - 2));
	for (char *p = reply; n > 0;) {
		ssize_t w = write(con, p, (size_t)n);
		if (w > 0) {
			p += w;
			n -= (int)w;
		} else if (errno != EINTR && errno != EAGAIN) {
			return;
		}
	}
}

static long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

static void name(char *out, const struct job *j, char kind)
{
	sprintf(out, "/run/xtest/%s.%c", j->id, kind);
}

static long size(const struct job *j, char kind)
{
	char path[64];
	struct stat st;
	name(path, j, kind);
	return stat(path, &st) ? 0 : (long)st.st_size;
}

static struct job *find(const char *id)
{
	for (int i = 0; i < JOBS; i++)
		if (jobs[i].state != FREE && !strcmp(jobs[i].id, id))
			return &jobs[i];
	return NULL;
}

static pid_t start(const char *in, const char *out, const char *err, char **argv)
{
	pid_t pid = fork();
	if (pid)
		return pid;
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
	int fd = open(in, O_RDONLY);
	dup2(fd, 0);
	fd = open(out, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
	dup2(fd, 1);
	fd = open(err, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
	dup2(fd, 2);
	for (int i = 3; i < 64; i++)
		close(i);
	execv(argv[0], argv);
	_exit(127);
}

static void answer(const struct job *j)
{
	if (j->state == DONE)
		say("A %s %d %d %ld %ld %ld", j->id, j->rc, j->timed_out, size(j, 'o'),
		    size(j, 'e'), size(j, 'z'));
	else
		say("W %s", j->id);
}

static void run(const char *id, long secs, const char *cmd64)
{
	struct job *j = find(id);
	if (j) {
		answer(j);
		return;
	}
	for (j = jobs; j < jobs + JOBS && j->state != FREE; j++)
		;
	if (j == jobs + JOBS)
		return;
	snprintf(j->id, sizeof j->id, "%s", id);
	decode(data, cmd64);
	char out[64], err[64];
	name(out, j, 'o');
	name(err, j, 'e');
	char *argv[] = { "/bin/sh", "-c", (char *)data, NULL };
	j->pid = start("/dev/null", out, err, argv);
	j->state = RUNS;
	j->rc = -1;
	j->timed_out = 0;
	j->deadline = now() + secs;
}

static void reaped(pid_t pid, int status)
{
	for (struct job *j = jobs; j < jobs + JOBS; j++) {
		if (j->pid != pid || (j->state != RUNS && j->state != PACKS))
			continue;
		if (j->state == RUNS) {
			j->rc = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
			if (size(j, 'o') > 2048) {
				char in[64], out[64];
				name(in, j, 'o');
				name(out, j, 'z');
				char *argv[] = { "/bin/gzip", "-1", "-c", NULL };
				j->pid = start(in, out, "/dev/null", argv);
				j->state = PACKS;
				return;
			}
		}
		j->state = DONE;
		answer(j);
	}
}

static void piece(const char *id, char kind, long off, long len)
{
	struct job *j = find(id);
	char path[64];
	if (!j || len < 1 || len > PIECE)
		return;
	name(path, j, kind);
	int fd = open(path, O_RDONLY);
	ssize_t n = fd < 0 ? 0 : pread(fd, data, (size_t)len, off);
	if (fd >= 0)
		close(fd);
	static char text[PIECE * 2 - 256];
	encode(text, data, n > 0 ? (size_t)n : 0);
	say("C %s %c %ld %s", id, kind, off, n > 0 ? text : "-");
}

static void forget(const char *id)
{
	struct job *j = find(id);
	if (j && j->state == DONE) {
		for (const char *k = "oez"; *k; k++) {
			char path[64];
			name(path, j, *k);
			unlink(path);
		}
		j->state = FREE;
	}
	say("O %s", id);
}

static void request(char *l)
{
	char *start = strrchr(l, '~'), *end = strrchr(l, ' ');
	if (!start || !end || end < start)
		return;
	if (strtoul(end + 1, NULL, 16) != crc32(start + 1, (size_t)(end - start - 1)))
		return;
	*end = 0;
	char id[24], kind;
	long a, b;
	int at = 0;
	if (sscanf(start, "~P %23s", id) == 1)
		say("O %s", id);
	else if (sscanf(start, "~R %23s %ld %n", id, &a, &at) == 2 && at)
		run(id, a, start + at);
	else if (sscanf(start, "~G %23s %c %ld %ld", id, &kind, &a, &b) == 4)
		piece(id, kind, a, b);
	else if (sscanf(start, "~D %23s", id) == 1)
		forget(id);
}

int main(int argc, char **argv)
{
	con = open(argc > 1 ? argv[1] : "/dev/console", O_RDWR | O_NOCTTY);
	struct termios t;
	if (!tcgetattr(con, &t)) {
		cfmakeraw(&t);
		tcsetattr(con, TCSAFLUSH, &t);
	}
	crc_init();
	setenv("PATH", "/bin", 1);
	sigset_t child;
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, NULL);
	int sig = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	struct utsname u;
	uname(&u);
	say("U %s", u.release);
	size_t have = 0;
	for (;;) {
		int busy = 0;
		for (struct job *j = jobs; j < jobs + JOBS; j++) {
			busy |= j->state == RUNS;
			if (j->state == RUNS && now() > j->deadline) {
				j->timed_out = 1;
				kill(-j->pid, SIGKILL);
			}
		}
		struct pollfd p[2] = { { con, POLLIN, 0 }, { sig, POLLIN, 0 } };
		poll(p, 2, busy ? 500 : -1);
		struct signalfd_siginfo si;
		while (read(sig, &si, sizeof si) > 0)
			;
		int status;
		for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
			reaped(pid, status);
		if (!(p[0].revents & POLLIN))
			continue;
		ssize_t n = read(con, line + have, sizeof line - 1 - have);
		if (n <= 0)
			continue;
		have += (size_t)n;
		char *from = line;
		for (char *nl; (nl = memchr(from, '\n', have)); from = nl + 1) {
			*nl = 0;
			have -= (size_t)(nl + 1 - from);
			request(from);
		}
		memmove(line, from, have);
		if (have == sizeof line - 1)
			have = 0;
	}
}
