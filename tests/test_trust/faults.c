/* Preloaded into a process, makes its n-th change of a file under $FAULT_ROOT fail, or kills it there.

   Counted are opening for writing, writing, truncating, syncing, making and removing directories, renaming, linking and
   unlinking. $FAULT_AT is the number of the change (from 1; 0: none), $FAULT_ERRNO the error, or 0 to kill.
   fault_count() tells how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long count;

static int inside(const char *path) {
    const char *root = getenv("FAULT_ROOT");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int inside_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return inside(path);
}

static int fails(void) {
    const char *at = getenv("FAULT_AT"), *code = getenv("FAULT_ERRNO");
    if (++count != (at ? atol(at) : 0)) return 0;
    if (!code || atoi(code) == 0) raise(SIGKILL);
    errno = atoi(code);
    return 1;
}

int fault_count(void) { return (int)count; }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CHECK(condition) if ((condition) && fails()) return -1

#define OPEN(name, mode_from, call)                                            \
    {                                                                          \
        mode_t mode = 0;                                                       \
        if (flags & (O_CREAT | O_TMPFILE)) {                                   \
            va_list more;                                                      \
            va_start(more, mode_from);                                         \
            mode = va_arg(more, mode_t);                                       \
            va_end(more);                                                      \
        }                                                                      \
        REAL(name);                                                            \
        CHECK((flags & (O_WRONLY | O_RDWR | O_CREAT)) && inside(path));        \
        return call;                                                           \
    }
int open(const char *path, int flags, ...) OPEN(open, flags, real(path, flags, mode))
int open64(const char *path, int flags, ...) OPEN(open64, flags, real(path, flags, mode))
int openat(int at, const char *path, int flags, ...) OPEN(openat, flags, real(at, path, flags, mode))
int openat64(int at, const char *path, int flags, ...) OPEN(openat64, flags, real(at, path, flags, mode))

/* A failing write leaves half of its bytes behind, as a full disk does. */
ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (inside_fd(fd)) {
        long before = count + 1;
        const char *at = getenv("FAULT_AT");
        if (at && atol(at) == before && size > 1) real(fd, data, size / 2);
        CHECK(1);
    }
    return real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); CHECK(inside_fd(fd)); return real(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); CHECK(inside_fd(fd)); return real(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *parts, int many) { REAL(writev); CHECK(inside_fd(fd)); return real(fd, parts, many); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); CHECK(inside_fd(fd)); return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); CHECK(inside_fd(fd)); return real(fd, size); }
int fsync(int fd) { REAL(fsync); CHECK(inside_fd(fd)); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); CHECK(inside_fd(fd)); return real(fd); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); CHECK(inside(path)); return real(path, mode); }
int rename(const char *from, const char *to) { REAL(rename); CHECK(inside(to)); return real(from, to); }
int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    REAL(renameat2); CHECK(inside(to)); return real(from_at, from, to_at, to, flags);
}
int link(const char *from, const char *to) { REAL(link); CHECK(inside(to)); return real(from, to); }
int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    REAL(linkat); CHECK(inside(to)); return real(from_at, from, to_at, to, flags);
}
int unlink(const char *path) { REAL(unlink); CHECK(inside(path)); return real(path); }
int unlinkat(int at, const char *path, int flags) { REAL(unlinkat); CHECK(inside(path) || inside_fd(at)); return real(at, path, flags); }
int rmdir(const char *path) { REAL(rmdir); CHECK(inside(path)); return real(path); }
int chmod(const char *path, mode_t mode) { REAL(chmod); CHECK(inside(path)); return real(path, mode); }
