/*
 * Records what a process has synced, by LD_PRELOAD. For paths that begin with $DKC_DISK_ROOT it
 * keeps in the folder $DKC_DISK_SHADOW the state that a power cut would leave. SIGKILL keeps the page
 * cache, so without this a process that never syncs looks as good as one that does.
 *
 *   shadow/data/INODE  the durable content of this file; a file without one was not written since the
 *                      last cut
 *   kept/N             the file that lost a name by name operation N; in the folder $DKC_DISK_KEPT
 *   shadow/names       one line per operation on names ("c" create, "m" mkdir, "r" rename, "l" link,
 *                      "u" unlink, "d" rmdir), with its folder, and one line "s" per fsync of a
 *                      folder, which makes all earlier operations in it durable
 *
 * Only the guarantees of POSIX count: bytes are durable after a sync of their file, a name after a
 * sync of its folder. `power.rs` undoes the rest after the process was killed. The shadow outlives
 * the process, as unsynced bytes do. It may be on another file system, so that a full disk does not
 * affect it; the kept files are hard links, so their folder must be on the same one.
 *
 * $DKC_DISK_FAULTS names a file of three 32-bit numbers, which others may change at any time: each
 * sync takes between the first and the second number in milliseconds, and so many syncs as the third
 * number fail with EIO.
 *
 * Writes by mmap, and files opened before the process began, are not recorded.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define FDS 65536
#define FILES 16384
#define PENDING 65536
/* Marks the entry of an inode that was removed. */
#define GONE ((ino_t)-1)

struct file {
    ino_t inode;
    /* The range that is written and not synced; empty if `to` is 0. */
    off_t from, to;
};

/* An operation on a name that no sync of its folder has covered. */
struct pending {
    uint32_t number;
    uint64_t folder;
};

static char root[PATH_MAX], shadow[PATH_MAX], keeps[PATH_MAX];
static size_t root_len;
static int names = -1;
static volatile uint32_t *faults;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct file files[FILES];
static struct pending pending[PENDING];
static unsigned pending_count, next_name;
/* The recorded file of each descriptor, counted from 1; 0 for none. */
static uint16_t file_of[FDS];

/* Opens a file without recording, unlike the function `open` of this library. */
static int real_open(int at, const char *path, int flags, mode_t mode) {
    return (int)syscall(SYS_openat, at, path, flags, mode);
}

static void die(const char *what) {
    dprintf(2, "disk shim: %s\n", what);
    _exit(99);
}

static uint64_t hash(const char *text, size_t len) {
    uint64_t sum = 1469598103934665603u;
    for (size_t at = 0; at < len; at++)
        sum = (sum ^ (unsigned char)text[at]) * 1099511628211u;
    return sum;
}

__attribute__((constructor)) static void begin(void) {
    const char *control = getenv("DKC_DISK_FAULTS");
    int file = control ? real_open(AT_FDCWD, control, O_RDWR | O_CLOEXEC, 0) : -1;
    if (file >= 0) {
        void *map = mmap(NULL, 12, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (map != MAP_FAILED)
            faults = map;
    }
    const char *below = getenv("DKC_DISK_ROOT"), *beside = getenv("DKC_DISK_SHADOW"), *links = getenv("DKC_DISK_KEPT");
    if (!below || !beside || !links)
        return;
    char path[PATH_MAX + 16];
    syscall(SYS_mkdirat, AT_FDCWD, beside, 0777);
    snprintf(shadow, sizeof shadow, "%s", beside);
    snprintf(path, sizeof path, "%s/data", shadow);
    syscall(SYS_mkdirat, AT_FDCWD, path, 0777);
    snprintf(keeps, sizeof keeps, "%s", links);
    syscall(SYS_mkdirat, AT_FDCWD, keeps, 0777);
    snprintf(path, sizeof path, "%s/names", shadow);
    names = real_open(AT_FDCWD, path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (names < 0)
        die("can't create its records");
    /* The line count is above all numbers of earlier processes, so none is reused. */
    char bytes[4096];
    ssize_t count;
    for (off_t at = 0; (count = pread(names, bytes, sizeof bytes, at)) > 0; at += count)
        for (ssize_t i = 0; i < count; i++)
            next_name += bytes[i] == '\n';
    snprintf(root, sizeof root, "%s", below);
    root_len = strlen(root);
}

/* Returns the whole path if it is below the root. */
static const char *ours(int at, const char *path, char *buffer) {
    if (!root_len || !path)
        return NULL;
    if (path[0] != '/') {
        if (at == AT_FDCWD)
            return NULL;
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t len = readlink(link, buffer, PATH_MAX - 1);
        if (len < 0)
            return NULL;
        snprintf(buffer + len, PATH_MAX - len, "/%s", path);
        path = buffer;
    }
    if (strstr(path, "//")) {
        /* A folder must have a single name, by which its syncs are matched. */
        char *out = buffer;
        for (const char *in = path; *in; in++)
            if (in[0] != '/' || in[1] != '/')
                *out++ = *in;
        *out = 0;
        path = buffer;
    }
    return strncmp(path, root, root_len) == 0 ? path : NULL;
}

static size_t folder_len(const char *path) {
    return (size_t)(strrchr(path, '/') - path);
}

static void data_path(char *out, ino_t inode) {
    snprintf(out, PATH_MAX + 64, "%s/data/%llu", shadow, (unsigned long long)inode);
}

static void kept_path(char *out, uint32_t number) {
    snprintf(out, PATH_MAX + 64, "%s/%u", keeps, number);
}

static void copy(int from, int to, off_t begin, off_t end) {
    char bytes[65536];
    while (begin < end) {
        size_t most = (size_t)(end - begin) < sizeof bytes ? (size_t)(end - begin) : sizeof bytes;
        ssize_t count = syscall(SYS_pread64, from, bytes, most, begin);
        if (count <= 0)
            return;
        if (syscall(SYS_pwrite64, to, bytes, count, begin) != count)
            die("its file system is full");
        begin += count;
    }
}

/* Returns the number of the file with this inode, counted from 1. */
static uint16_t know(ino_t inode) {
    unsigned at = inode % FILES, free = FILES;
    for (unsigned tries = 0; tries < FILES; tries++, at = (at + 1) % FILES) {
        if (files[at].inode == inode)
            return (uint16_t)(at + 1);
        if (files[at].inode == GONE && free == FILES)
            free = at;
        if (files[at].inode == 0)
            break;
    }
    if (free == FILES && files[at].inode == 0)
        free = at;
    if (free == FILES)
        die("too many files");
    files[free] = (struct file){inode, 0, 0};
    return (uint16_t)(free + 1);
}

/* Removes a file whose last name is durably removed. */
static void forget(ino_t inode) {
    struct file *file = &files[know(inode) - 1];
    *file = (struct file){GONE, 0, 0};
}

/* Records a file that is about to be written. If it is not recorded yet, its content is durable. */
static uint16_t preserve(int fd, int is_new) {
    struct stat stat;
    if (fstat(fd, &stat) != 0 || !S_ISREG(stat.st_mode))
        return 0;
    char path[PATH_MAX + 64];
    data_path(path, stat.st_ino);
    uint16_t file = know(stat.st_ino);
    int kept = real_open(AT_FDCWD, path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (kept >= 0) {
        int known = is_new;
        if (!is_new) {
            char self[64];
            snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
            int from = real_open(AT_FDCWD, self, O_RDONLY | O_CLOEXEC, 0);
            copy(from, kept, 0, stat.st_size);
            known = from >= 0;
            close(from);
        }
        close(kept);
        if (!known)
            syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    } else {
        /* An earlier process recorded it; the range that it did not sync is unknown. */
        files[file - 1].from = 0;
        files[file - 1].to = INT64_MAX;
    }
    return file;
}

static void dirty(int fd, off_t from, off_t to) {
    if (fd < 0 || fd >= FDS || !file_of[fd] || from < 0)
        return;
    pthread_mutex_lock(&lock);
    struct file *file = &files[file_of[fd] - 1];
    if (file->to == 0 || from < file->from)
        file->from = from;
    if (to > file->to)
        file->to = to;
    pthread_mutex_unlock(&lock);
}

/* ---- names ------------------------------------------------------------------------------------ */

/* Records an operation in the folder of `path` before it happens; `gone` is the file that loses a
   name, if any. Returns 0 if the folder is not below the root, so that it is not recorded. */
static int note(char what, const char *path, const char *other, const char *gone) {
    char line[3 * PATH_MAX], kept[PATH_MAX + 64];
    if (folder_len(path) < root_len)
        return 0;
    uint32_t number = next_name++;
    int has_kept = 0;
    if (gone) {
        kept_path(kept, number);
        has_kept = syscall(SYS_linkat, AT_FDCWD, gone, AT_FDCWD, kept, 0) == 0;
        if (!has_kept && errno != ENOENT) {
            /* Without inodes the operation cannot be undone, so it counts as durable. */
            next_name--;
            return 0;
        }
    }
    size_t len = (size_t)snprintf(line, sizeof line, "%c\t%u\t%d\t%.*s\t%s\t%s\n", what, number, has_kept,
                                  (int)folder_len(path), path, path, other ? other : "");
    if (write(names, line, len) != (ssize_t)len)
        die("its file system is full");
    if (pending_count == PENDING)
        die("too many names without a sync");
    pending[pending_count++] = (struct pending){number, hash(path, folder_len(path))};
    return 1;
}

/* Removes the record of an operation that failed. */
static void undo_note(void) {
    char line[64];
    int len = snprintf(line, sizeof line, "x\t%u\t0\t\t\t\n", pending[--pending_count].number);
    if (write(names, line, (size_t)len) != len)
        die("its file system is full");
    next_name++;
}

static void synced_folder(const char *folder) {
    char line[PATH_MAX + 64], path[PATH_MAX + 64];
    if (strncmp(folder, root, root_len) != 0)
        return;
    int len = snprintf(line, sizeof line, "s\t%u\t0\t%s\t\t\n", next_name++, folder);
    if (write(names, line, (size_t)len) != len)
        die("its file system is full");
    uint64_t which = hash(folder, strlen(folder));
    unsigned left = 0;
    for (unsigned at = 0; at < pending_count; at++) {
        if (pending[at].folder != which) {
            pending[left++] = pending[at];
            continue;
        }
        struct stat stat;
        kept_path(path, pending[at].number);
        if (lstat(path, &stat) != 0)
            continue;
        syscall(SYS_unlinkat, AT_FDCWD, path, 0);
        if (stat.st_nlink == 1) {
            data_path(path, stat.st_ino);
            syscall(SYS_unlinkat, AT_FDCWD, path, 0);
            forget(stat.st_ino);
        }
    }
    pending_count = left;
}

/* ---- replaced functions of libc --------------------------------------------------------------- */

static int open_at(int at, const char *name, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    const char *path = ours(at, name, buffer);
    int writes = (flags & O_ACCMODE) != O_RDONLY;
    if (!path || (!writes && !(flags & O_CREAT)) || (flags & O_TMPFILE) == O_TMPFILE) {
        int fd = real_open(at, name, flags, mode);
        if (fd >= 0 && fd < FDS)
            file_of[fd] = 0;
        return fd;
    }
    pthread_mutex_lock(&lock);
    struct stat stat;
    int is_new = (flags & O_CREAT) && lstat(path, &stat) != 0;
    int recorded = is_new && note('c', path, NULL, NULL);
    /* The file is truncated only after its content is saved. */
    int fd = real_open(at, name, flags & ~O_TRUNC, mode);
    int error = errno;
    if (fd < 0 && recorded)
        undo_note();
    if (fd >= 0 && fd < FDS) {
        file_of[fd] = preserve(fd, is_new);
        if ((flags & O_TRUNC) && !is_new && file_of[fd]) {
            if (syscall(SYS_ftruncate, fd, 0) != 0)
                die("can't empty a file");
            files[file_of[fd] - 1].from = 0;
            files[file_of[fd] - 1].to = INT64_MAX;
        }
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define MODE(flags)                                                                                                    \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                                                             \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }

int open(const char *path, int flags, ...) {
    MODE(flags)
    return open_at(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return open_at(AT_FDCWD, path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    MODE(flags)
    return open_at(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    MODE(flags)
    return open_at(at, path, flags, mode);
}
int creat(const char *path, mode_t mode) {
    return open_at(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
}

int close(int fd) {
    if (fd >= 0 && fd < FDS)
        file_of[fd] = 0;
    return (int)syscall(SYS_close, fd);
}

/* Records a second descriptor of a recorded file. */
static int same_file(int fd, int copy) {
    if (copy >= 0 && copy < FDS)
        file_of[copy] = fd >= 0 && fd < FDS ? file_of[fd] : 0;
    return copy;
}

int dup(int fd) {
    return same_file(fd, (int)syscall(SYS_dup, fd));
}
int dup3(int fd, int copy, int flags) {
    return same_file(fd, (int)syscall(SYS_dup3, fd, copy, flags));
}
int dup2(int fd, int copy) {
    return fd == copy ? (int)syscall(SYS_fcntl, fd, F_GETFD) < 0 ? -1 : copy : dup3(fd, copy, 0);
}
int fcntl64(int fd, int what, ...) {
    va_list rest;
    va_start(rest, what);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    int done = (int)syscall(SYS_fcntl, fd, what, argument);
    return what == F_DUPFD || what == F_DUPFD_CLOEXEC ? same_file(fd, done) : done;
}
int fcntl(int fd, int what, ...) __attribute__((alias("fcntl64")));

/* Returns the position of a write without an offset. */
static off_t position(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return lseek64(fd, 0, flags >= 0 && (flags & O_APPEND) ? SEEK_END : SEEK_CUR);
}

static int is_ours(int fd) {
    return fd >= 0 && fd < FDS && file_of[fd];
}

ssize_t write(int fd, const void *bytes, size_t count) {
    off_t at = is_ours(fd) ? position(fd) : 0;
    ssize_t done = syscall(SYS_write, fd, bytes, count);
    if (done > 0 && is_ours(fd))
        dirty(fd, at, at + done);
    return done;
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    off_t at = is_ours(fd) ? position(fd) : 0;
    ssize_t done = syscall(SYS_writev, fd, parts, count);
    if (done > 0 && is_ours(fd))
        dirty(fd, at, at + done);
    return done;
}
ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
    ssize_t done = syscall(SYS_pwrite64, fd, bytes, count, at);
    if (done > 0)
        dirty(fd, at, at + done);
    return done;
}
ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at) {
    return pwrite64(fd, bytes, count, at);
}
int ftruncate64(int fd, off64_t len) {
    int done = (int)syscall(SYS_ftruncate, fd, len);
    if (done == 0)
        dirty(fd, len, INT64_MAX);
    return done;
}
int ftruncate(int fd, off_t len) {
    return ftruncate64(fd, len);
}

/* Syncs with the delay and the errors that are set. */
static int sync_on(int fd, long call) {
    if (faults) {
        uint32_t least = faults[0], most = faults[1], fails = faults[2];
        if (most > 0) {
            struct timespec now;
            syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
            uint32_t ms = least + (uint32_t)(now.tv_nsec / 1000) % (most - least + 1);
            struct timespec wait = {ms / 1000, (long)(ms % 1000) * 1000000};
            syscall(SYS_nanosleep, &wait, NULL);
        }
        if (is_ours(fd) && fails > 0 && __sync_bool_compare_and_swap(&faults[2], fails, fails - 1)) {
            errno = EIO;
            return -1;
        }
    }
    return (int)syscall(call, fd);
}

static int sync_file(int fd, long call) {
    struct stat stat;
    if (!root_len || sync_on(fd, call) != 0)
        return root_len ? -1 : sync_on(fd, call);
    int error = errno;
    char path[PATH_MAX + 64];
    if (fstat(fd, &stat) == 0 && S_ISDIR(stat.st_mode)) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        char folder[PATH_MAX];
        ssize_t len = readlink(path, folder, sizeof folder - 1);
        if (len > 0) {
            folder[len] = 0;
            pthread_mutex_lock(&lock);
            synced_folder(folder);
            pthread_mutex_unlock(&lock);
        }
    } else {
        pthread_mutex_lock(&lock);
        data_path(path, stat.st_ino);
        int kept = real_open(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
        /* Without free descriptors a file cannot be recorded, so it counts as durable. */
        int known = kept >= 0 || errno == ENOENT;
        /* A sync of a read-only descriptor covers all writes of other descriptors. */
        struct file *file = is_ours(fd) ? &files[file_of[fd] - 1] : NULL;
        if (kept >= 0) {
            char self[64];
            snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
            int from = real_open(AT_FDCWD, self, O_RDONLY | O_CLOEXEC, 0);
            off_t begin = file ? file->from : 0, end = file ? file->to : stat.st_size;
            known = from >= 0;
            copy(from, kept, begin, end < stat.st_size ? end : stat.st_size);
            if (syscall(SYS_ftruncate, kept, stat.st_size) != 0)
                die("its file system is full");
            close(from);
            close(kept);
        }
        if (!known)
            syscall(SYS_unlinkat, AT_FDCWD, path, 0);
        if (file)
            file->from = file->to = 0;
        pthread_mutex_unlock(&lock);
    }
    errno = error;
    return 0;
}

int fsync(int fd) {
    return sync_file(fd, SYS_fsync);
}
int fdatasync(int fd) {
    return sync_file(fd, SYS_fdatasync);
}

/* Performs an operation on names under the lock, after its record is written. */
#define NAMED(what, path, other, gone, call)                                                                           \
    pthread_mutex_lock(&lock);                                                                                         \
    int recorded = note(what, path, other, gone);                                                                      \
    int done = (int)(call), error = errno;                                                                             \
    if (done != 0 && recorded)                                                                                         \
        undo_note();                                                                                                   \
    pthread_mutex_unlock(&lock);                                                                                       \
    errno = error;                                                                                                     \
    return done;

int renameat(int at, const char *from, int to_at, const char *to) {
    char one[PATH_MAX], two[PATH_MAX];
    const char *old = ours(at, from, one), *path = ours(to_at, to, two);
    if (!old || !path)
        return (int)syscall(SYS_renameat, at, from, to_at, to);
    NAMED('r', path, old, path, syscall(SYS_renameat, at, from, to_at, to))
}
int renameat2(int at, const char *from, int to_at, const char *to, unsigned flags) {
    if (flags == 0)
        return renameat(at, from, to_at, to);
    return (int)syscall(SYS_renameat2, at, from, to_at, to, flags);
}
int rename(const char *from, const char *to) {
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}
int linkat(int at, const char *from, int to_at, const char *to, int flags) {
    char two[PATH_MAX];
    const char *path = ours(to_at, to, two);
    if (!path)
        return (int)syscall(SYS_linkat, at, from, to_at, to, flags);
    NAMED('l', path, NULL, NULL, syscall(SYS_linkat, at, from, to_at, to, flags))
}
int link(const char *from, const char *to) {
    return linkat(AT_FDCWD, from, AT_FDCWD, to, 0);
}
int unlinkat(int at, const char *name, int flags) {
    char one[PATH_MAX];
    const char *path = ours(at, name, one);
    if (!path)
        return (int)syscall(SYS_unlinkat, at, name, flags);
    int is_folder = (flags & AT_REMOVEDIR) != 0;
    NAMED(is_folder ? 'd' : 'u', path, NULL, is_folder ? NULL : path, syscall(SYS_unlinkat, at, name, flags))
}
int unlink(const char *path) {
    return unlinkat(AT_FDCWD, path, 0);
}
int rmdir(const char *path) {
    return unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}
int remove(const char *path) {
    struct stat stat;
    return unlinkat(AT_FDCWD, path, lstat(path, &stat) == 0 && S_ISDIR(stat.st_mode) ? AT_REMOVEDIR : 0);
}
int mkdirat(int at, const char *name, mode_t mode) {
    char one[PATH_MAX];
    const char *path = ours(at, name, one);
    if (!path)
        return (int)syscall(SYS_mkdirat, at, name, mode);
    NAMED('m', path, NULL, NULL, syscall(SYS_mkdirat, at, name, mode))
}
int mkdir(const char *path, mode_t mode) {
    return mkdirat(AT_FDCWD, path, mode);
}
